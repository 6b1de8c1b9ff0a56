"""How a student or a teacher is made: objectives, players, trainer and data."""
