"""The coordinator's certificates."""

import stat

import pytest
from medfed_test_federation import make_place

from medfed.errors import ConfigError, EnvironmentFault
from medfed.server.certificates import (
    SERVER_DAYS,
    certificate_days_left,
    check_server_certificate,
    create_authority,
    create_server_certificate,
)

DAY = 86400.0


class At:
    """The system's clock, shifted."""

    def __init__(self, clock, days: float) -> None:
        self._clock, self._days = clock, days

    def wall(self) -> float:
        return self._clock.wall() + self._days * DAY


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("made"), hospitals=0)


def check(place, clock=None, **changes):
    paths = place.certificates
    files = {"certificate": paths.certificate, "key": paths.key, "authority": paths.authority} | changes
    return check_server_certificate(place.seams.files, **files, clock=clock or place.seams.clock)


def test_certificate_just_made_is_accepted_and_its_keys_are_private(made):
    assert check(made).startswith("-----BEGIN CERTIFICATE-----")
    for path in (made.certificates.key, made.certificates.authority_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert certificate_days_left(made.seams.files, made.certificates.certificate, made.seams.clock) > SERVER_DAYS - 1


@pytest.mark.parametrize(("days", "word"), [(SERVER_DAYS + 1, "expired"), (-1, "not valid yet")])
def test_certificate_outside_its_validity_is_refused(made, days, word):
    check(made, At(made.seams.clock, SERVER_DAYS - 1))
    with pytest.raises(EnvironmentFault, match=word) as caught:
        check(made, At(made.seams.clock, days))
    assert caught.value.code == 612


def test_certificate_of_another_authority_is_refused(made, tmp_path):
    other = make_place(tmp_path, hospitals=0)
    with pytest.raises(EnvironmentFault, match="not issued by") as caught:
        check(made, authority=other.certificates.authority)
    assert caught.value.code == 612


def test_certificate_of_another_key_is_refused(made, tmp_path):
    other = make_place(tmp_path, hospitals=0)
    with pytest.raises(EnvironmentFault, match="not the certificate of") as caught:
        check(made, key=other.certificates.key)
    assert caught.value.code == 211


def test_key_that_others_can_read_is_refused(tmp_path):
    place = make_place(tmp_path, hospitals=0)
    place.certificates.key.chmod(0o644)
    with pytest.raises(EnvironmentFault) as caught:
        check(place)
    assert caught.value.code == 210


def test_certificate_file_of_nonsense_is_refused(made, tmp_path):
    bad = tmp_path / "bad.crt"
    bad.write_text("no certificate")
    with pytest.raises(EnvironmentFault) as caught:
        check(made, certificate=bad)
    assert caught.value.code == 211


def test_authority_is_never_overwritten_and_a_server_certificate_is_renewed(tmp_path):
    place = make_place(tmp_path, hospitals=0)
    with pytest.raises(ConfigError) as caught:
        create_authority(place.seams.files, place.certificates, place.seams.clock)
    assert caught.value.code == 212
    old = place.certificates.certificate.read_bytes()
    create_server_certificate(place.seams.files, place.certificates, ["fl.example.org", "::1"], place.seams.clock)
    assert place.certificates.certificate.read_bytes() != old
    check(place)


@pytest.mark.parametrize(
    "hosts", [[], ["https://fl.example.org"], ["host:8443"], ["a b"], [""], ["x" * 300], ["ä.org"]]
)
def test_host_that_cannot_stand_in_a_certificate_is_refused(made, hosts):
    with pytest.raises(ConfigError) as caught:
        create_server_certificate(made.seams.files, made.certificates, hosts, made.seams.clock)
    assert caught.value.code == 203
