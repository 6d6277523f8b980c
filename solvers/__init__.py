"""Choose a plan: search over the lattice of strategies, linear and integer programs."""
