"""Which tokens stay exact once they leave the window: scores, how they are pooled, and the choice of the best."""
