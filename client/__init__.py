"""The hospital's side: its data, its policy, its ledger, its part in a round."""
