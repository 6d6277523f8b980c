"""Was the prediction right: measurements, calibration, comparison, reports and plots."""
