"""Evaluation of llm, slm and llm_to_slm systems: quality, speed, records and the leaderboard."""
