"""Tests of the pack's part of the front end, in the real front end in Chromium."""
