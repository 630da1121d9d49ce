"""Claims: what papers say, as comparisons that anyone can run again and see hold or fail.

A file ``claims/<method>.py`` holds one :class:`Claim`; ``claims/results/<method>.json`` the last recorded result.
"""

from stillhouse.claims.claim import (
    RECORDS,
    RESULTS,
    Claim,
    Margin,
    Outcome,
    all_claims,
    find_claim,
    judge,
    last_result,
    run_claim,
)

__all__ = [
    "RECORDS",
    "RESULTS",
    "Claim",
    "Margin",
    "Outcome",
    "all_claims",
    "find_claim",
    "judge",
    "last_result",
    "run_claim",
]
