"""One sweep: its options, its plan, who computes it, what is committed."""
