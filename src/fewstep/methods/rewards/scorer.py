"""The former place of `fewstep.scorers.scorer`."""

from fewstep.scorers.scorer import check_rows as check_rows
from fewstep.scorers.scorer import in_batches as in_batches
