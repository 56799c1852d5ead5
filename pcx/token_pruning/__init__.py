"""Pruning of image tokens without training."""

from pcx.token_pruning.search import SearchResult, search
from pcx.token_pruning.zero_tprune import Pruning

__all__ = ["Pruning", "SearchResult", "search"]
