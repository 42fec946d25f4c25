"""Everything that decides: heuristics, policies, their distributions, and the algorithms that train them."""
