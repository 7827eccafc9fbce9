"""Which facts about the connections do weight files alone give? What they are before any forward."""
