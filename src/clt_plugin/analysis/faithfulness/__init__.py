"""Whether a crosscoder may be believed: skipped hops, handoffs, knock-on effects, and the report of them all."""
