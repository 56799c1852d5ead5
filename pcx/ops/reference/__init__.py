"""References of all ops in plain torch.

They are the oracle of the tests, the backend that runs on any device, and what export records.
"""
