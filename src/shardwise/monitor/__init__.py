"""What an engine tells while it trains: lines of the log, events for trackers, profiles.

Everything here is an ``Observer``. An engine whose configuration asks for none has none, and pays nothing.
"""
