"""How students and erased models are judged: fidelity, concept detection, erasure, and the report that shows it."""
