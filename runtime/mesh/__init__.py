"""What several processes do together: who they are, where they meet, what travels."""
