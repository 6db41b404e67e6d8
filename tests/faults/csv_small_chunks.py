"""For workers that are processes of their own: `csv.import` keeps each piece that it has copied."""

from services.worker.kinds import csv_import

csv_import.KEEP_EVERY = 0.0
