"""The game of arXiv 2605.09515 on bare arrays: v(C) = H(C), the joint entropy of a coalition of heads. All in nats.

Every function takes integers [observations, heads], as a torch or numpy array, and answers in float64.
"""

from compressor.game.dividends import pair_dividends, triple_dividends
from compressor.game.entropy import entropies, pair_entropies, triple_entropies
from compressor.game.values import phi

__all__ = ["entropies", "pair_dividends", "pair_entropies", "phi", "triple_dividends", "triple_entropies"]
