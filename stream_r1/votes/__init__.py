"""People's preference: a page of blind comparisons that one serves oneself, and what the votes say.

stream-r1 votes serve votes.yaml      two videos of one prompt, side by side, models hidden
stream-r1 votes report votes.yaml     win rates with intervals, agreement of the raters
"""
