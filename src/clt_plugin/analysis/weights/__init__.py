"""What a crosscoder's weights say on their own: scans that stream them, layer pair by layer pair."""
