"""How accurate the cost models are: fitted on some measurements, scored on others."""
