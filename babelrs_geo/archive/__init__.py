"""Many scenes, nothing lost: sources, a ledger, runs that go on where they stopped, and what they leave."""
