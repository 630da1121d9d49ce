"""Claims: what papers say, as comparisons that anyone can run again and see hold or fail.

A file ``claims/<method>.py`` holds one :class:`Claim`; ``claims/results/<method>.json`` the last recorded result.
"""

from stillhouse.claims.claim import Claim, Margin, Outcome, find_claim, last_result, run_claim

__all__ = ["Claim", "Margin", "Outcome", "find_claim", "last_result", "run_claim"]
