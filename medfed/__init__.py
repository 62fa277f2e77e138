"""medfed: private federated training of medical models.

This package is the hall: the contract that every side of a federation shares. The rooms are ``medfed.models``,
``medfed.privacy``, ``medfed.client`` (the hospital), ``medfed.server`` (the coordinator) and ``medfed.simulations``.
"""

__version__ = "0.1.0"
