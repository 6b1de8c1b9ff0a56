"""How a concept is removed from a model's weights: requests, and the parts methods are composed of."""
