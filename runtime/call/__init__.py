"""How a function is called: arguments checked, and results structured as the model has them."""
