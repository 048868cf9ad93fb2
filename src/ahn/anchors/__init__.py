"""Which evicted tokens stay exact: the scores by which they are chosen, and how layers cast them."""
