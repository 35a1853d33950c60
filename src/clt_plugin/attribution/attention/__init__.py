"""Where attention looks, and what it carries: scores taken apart, edges split by head."""
