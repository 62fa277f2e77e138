"""One coordinator, two nodes, real TLS on loopback: the contract with Flower 1.41."""

import statistics

import flwr


def test_flower_is_the_version_the_adapters_were_read_against():
    assert flwr.__version__.startswith("1.41.")


def test_rounds_over_tls_carry_the_bytes_and_cost_little(place):
    server = place.serve("rounds", hospitals=2, rounds=6)
    nodes = [place.node(i, lambda data, i=i: b"h%d:" % i + data) for i in range(2)]
    try:
        assert server.result() == 0
    finally:
        outcomes = [node.end() for node in nodes]
    result = place.result()
    assert outcomes == [None, None]
    assert result["answers"][3] == [[0, "h0:round 3"], [1, "h1:round 3"]]
    assert not result["token_in_argv"]
    print(result["seconds"])
    assert statistics.median(result["seconds"]) < 1.0
