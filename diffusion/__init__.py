"""The mathematics of noise: schedules, predictions, conditions, denoisers, guidance and samplers; torch only."""
