"""The coordinator's side of Flower: its SuperLink in our process behind our guard, our run loop, our child.

    guard.py      what the public port lets through, and the check of it at each start
    superlink.py  Flower's SuperLink on two ports, registration, runs
    grid.py       the exchange of server/exchange.py over any Flower grid; the ServerApp
    child.py      the process that runs the ServerApp
    serve.py      all of it: start, check, run, stop

Nothing else of the coordinator imports Flower. Import these modules lazily: Flower takes most of a second.
"""
