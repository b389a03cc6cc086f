"""The former place of `fewstep.scorers.reward`."""

from fewstep.scorers.reward import PreferenceScorer as PreferenceScorer
from fewstep.scorers.reward import ScorerIdentity as ScorerIdentity
