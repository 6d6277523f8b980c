"""What things cost: chips, links, topologies, kernels, collectives, memory; data and formulas."""
