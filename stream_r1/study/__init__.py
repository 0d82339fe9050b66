"""Whether one way of weighting is better than another: arms and seeds of a distillation, in pairs."""
