"""What a run leaves at the coordinator: every attempt in the report, each round by its kind."""

import json

from medfed_test_post import Coordinator, Post

from medfed.seams import system_seams
from medfed.server.results import write_results

METRICS = ("[deadlines]", "[metrics]\nbins = 4\nattempts = 2\n[deadlines]")


def test_report_lists_lost_attempts_and_says_which_round_was_of_the_metrics(make_world, tmp_path):
    world = make_world(METRICS)
    world.start_all()
    coordinator = Coordinator(world, Post(world))

    def restart(checkpoint, what):
        if what == "round 1 done":
            world.start(0)

    coordinator.observe = restart
    checkpoint = coordinator.run()
    write_results(system_seams().files, tmp_path / "run", world.assignment, checkpoint, coordinator.rounds.record)
    report = (tmp_path / "run" / "report.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:]]
        for line in report.splitlines()
        if line.startswith(("| 1", "| 2", "| 3", "| 4", "| 5"))
    ]
    assert [row[:3] for row in rows] == [
        ["1", "1", "training"],
        ["2", "lost", ""],
        ["3", "2", "training"],
        ["4", "3", "training"],
        ["5", "4", "metrics"],
    ]
    assert "4 rounds (3 of training, 1 of metrics), 5 of 7 attempts used" in report
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["rounds"], result["released_sums"], result["attempts"]) == (3, 4, 5)
