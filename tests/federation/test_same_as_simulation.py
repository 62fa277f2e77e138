"""Coordinator and hospitals over loopback TLS end with the simulation's model, bit for bit."""

import contextlib
import functools
from dataclasses import replace

import numpy as np
import pytest
from medfed_test_federation import Running, running
from medfed_test_seeded import SEED

from medfed.client.compute import choose_compute
from medfed.client.daemon import open_hospital
from medfed.client.local_steps import weighted_words
from medfed.client.node import Node, NodeSettings
from medfed.model_choice import Mlp
from medfed.privacy.noise import discrete_gaussian
from medfed.seams import system_seams
from medfed.server.daemon import load_assignment, run_folder
from medfed.server.link.serve import ChildTask, serve
from medfed.server.link.superlink import LinkSettings
from medfed.server.planning import load_task
from medfed.server.setup import load_office
from medfed.server.store import Store
from medfed.simulations.cohorts import load_cohort
from medfed.simulations.federation import free_ports
from medfed.simulations.rehearsal import Ports, Rehearsal, lay_out, no_noise, rehearse
from medfed.wire import frame_limit_bytes

PLAN = Rehearsal(epsilon=1.0, mode="distributed", rounds=4, seed=SEED, exact=True)


def _federate(folder, cohort, seams, plan=PLAN, noise=discrete_gaussian, **options):
    """The same folders run by the real link and nodes: a child process for the training, TLS for the hospitals."""
    ports = Ports(*free_ports(2))
    sites = lay_out(folder, cohort, plan, seams, ports=ports)
    config_path = folder / "coordinator" / "server.toml"
    office = load_office(seams, config_path)
    assignment = load_assignment(office)
    files = office.certificates
    settings = LinkSettings(
        host="127.0.0.1",
        port=ports.public,
        admin_port=ports.admin,
        certificate=files.certificate,
        key=files.key,
        certificate_authority=files.authority,
    )
    keys = [entry.node_key.encode() for entry in assignment.roster.hospitals]
    server = Running()
    limit = frame_limit_bytes(assignment.vector_limit_bytes)
    work = ChildTask("medfed_test_seeded:train", config_path, limit)
    server.start(lambda: serve(settings, keys, work, seams, server.stop))
    with contextlib.ExitStack() as stack:
        nodes = []
        for site in sites:
            hospital = stack.enter_context(open_hospital(site, noise, **options))
            limits = {"limit_bytes": hospital.frame_limit_bytes}
            to = NodeSettings(f"localhost:{ports.public}", files.authority, site.node_key_path, **limits)
            node, one = Node(to, hospital.handle, seams), Running()
            nodes.append(one.start(lambda node=node, one=one: node.run_forever(one.stop)))
        with running(server, *nodes):
            assert server.result() == 0
            for node in nodes:
                node.end()
    return Store(seams.files, run_folder(office, assignment), assignment.study, assignment.plan.words).load_checkpoint()


def test_federation_over_tls_with_the_simulation_s_entropy_ends_with_its_model_bit_for_bit(place, tmp_path):
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", SEED, 3)
    simulated = rehearse(tmp_path / "simulated", cohort, PLAN, seams)
    real = _federate(tmp_path / "real", cohort, seams)
    assert real.state.completed_rounds == 4
    for name in ("weights", "first", "second", "tail"):
        a, b = getattr(simulated.checkpoint.state, name), getattr(real.state, name)
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
    assert simulated.checkpoint.total == real.total


@pytest.mark.parametrize(
    "name",
    [
        "synthetic-images",
        pytest.param("synthetic-series", marks=pytest.mark.soak),
        pytest.param("synthetic-notes", marks=pytest.mark.soak),
    ],
)
def test_deep_model_over_tls_ends_with_the_simulation_s_model_bit_for_bit(place, tmp_path, name):
    """A convolutional, a recurrent and a Transformer model, from the hospitals' own files."""
    seams = system_seams()
    cohort = load_cohort(seams.files, name, SEED, 3, 16)
    plan = Rehearsal(epsilon=8.0, mode="distributed", rounds=2, seed=SEED, exact=True)
    simulated = rehearse(tmp_path / "simulated", cohort, plan, seams)
    real = _federate(tmp_path / "real", cohort, seams, plan, choose=functools.cache(choose_compute))
    assert real.state.completed_rounds == 2
    assert real.state.weights.tobytes() == simulated.checkpoint.state.weights.tobytes()
    assert simulated.checkpoint.total == real.total


def test_model_of_several_pieces_over_tls_ends_with_the_plain_sum_bit_for_bit(place, tmp_path):
    """1.5 million parameters: requests and uploads of three pieces each."""
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", SEED, 3)
    sent: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}

    def known_update(approved, weights, entropy, noise):
        rng = np.random.default_rng([approved.position, len(sent[approved.position])])
        update = rng.normal(0.0, 1e-3, approved.plan.words)
        sent[approved.position].append(weighted_words(approved, update, entropy))
        return update

    task = load_task(seams.files, "example-update")
    local = task.training.model_copy(update={"rounds": 2, "average_last_rounds": 1})
    wide = load_task(seams.files, "breast-cancer").model_copy(
        update={"model": Mlp(name="mlp", hidden=[1200, 1200]), "training": local}
    )
    plan = Rehearsal(epsilon=8.0, mode="local", rounds=2, seed=SEED)
    options = {"noise": no_noise, "local_update": known_update}
    real = _federate(tmp_path / "real", replace(cohort, task=wide), seams, plan, **options)
    assert real.state.weights.size > 1_400_000
    assert [len(vectors) for vectors in sent.values()] == [2, 2, 2]
    plain = np.sum([vectors[-1] for vectors in sent.values()], axis=0)
    assert np.count_nonzero(plain) > 1_000_000
    np.testing.assert_array_equal(np.frombuffer(real.total, "<i4"), plain)


def test_simulation_with_another_seed_ends_with_another_model(tmp_path):
    """The control: the comparison can fail."""
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", SEED, 3)
    one = rehearse(tmp_path / "one", cohort, PLAN, seams)
    other = rehearse(
        tmp_path / "other", cohort, Rehearsal(1.0, "distributed", rounds=4, seed=SEED + 1, exact=True), seams
    )
    assert not np.array_equal(one.weights, other.weights)


@pytest.mark.parametrize("exact", [True, False])
def test_simulation_repeated_with_a_seed_is_bit_equal(tmp_path, exact):
    seams = system_seams()
    cohort = load_cohort(seams.files, "breast-cancer", 5, 3)
    plan = Rehearsal(1.0, "local", rounds=2, seed=5, model="mlp", exact=exact)
    runs = [rehearse(tmp_path / name, cohort, plan, seams) for name in ("a", "b")]
    np.testing.assert_array_equal(runs[0].weights, runs[1].weights)
