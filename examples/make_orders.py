"""Writes orders.csv beside this file: 50,000 made-up orders, the same ones every time."""

import csv
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROWS = 50_000
FIRST = (
    "Ada",
    "Bram",
    "Chloé",
    "Dmitri",
    "Elif",
    "Femi",
    "Grace",
    "Hana",
    "Iker",
    "José",
    "Kofi",
    "Léa",
    "Mei",
    "Noor",
)
LAST = ("Adler", "Brooks", "Castro", "Dubois", "Eriksen", "Fischer", "García", "Haddad", "Ito", "Jensen", "Kim", "Łoś")
COUNTRIES = {"Austria": 6, "Brazil": 9, "France": 12, "Germany": 16, "Japan": 8, "Kenya": 4, "Türkiye": 5, "USA": 20}
PRODUCTS = {
    "Desk lamp": "34.90",
    'Monitor 27"': "289.00",
    "Notebook, ruled": "4.75",
    "Office chair": "179.50",
    "Pen set": "12.20",
    "Standing desk": "449.00",
    "USB-C cable": "9.99",
    "Whiteboard, 90 x 60 cm": "58.40",
}
NOTES = (
    "gift wrap",
    "call before delivery",
    'engrave "Für Zoë"',
    "second floor, left",
    "naïve customer ☕, be kind",
    "leave with neighbour\nif nobody is home",
)


def orders() -> list[list[object]]:
    """The rows, in the order of their time."""
    draw = random.Random(20250101)  # noqa: S311  the same rows every time is the point
    at = datetime(2025, 1, 1, 6, tzinfo=UTC)
    rows: list[list[object]] = []
    for number in range(1, ROWS + 1):
        at += timedelta(seconds=draw.randint(1, 1200))
        product, price = draw.choice(list(PRODUCTS.items()))
        cents = round(int(price.replace(".", "")) * draw.choice((0.9, 0.95, 1, 1, 1, 1)))
        quantity = draw.choice((1, 1, 1, 1, 2, 2, 3, 4, 10))
        rows.append(
            [
                number,
                at.isoformat().replace("+00:00", "Z"),
                f"{draw.choice(FIRST)} {draw.choice(LAST)}",
                *draw.choices(list(COUNTRIES), list(COUNTRIES.values())),
                product,
                quantity,
                f"{cents / 100:.2f}",
                f"{cents * quantity / 100:.2f}",
                "true" if draw.random() < 0.93 else "false",
                draw.choice(NOTES) if draw.random() < 0.12 else "",
            ]
        )
    return rows


if __name__ == "__main__":
    header = ["id", "ordered_at", "customer", "country", "product", "quantity", "unit_price", "total", "paid", "note"]
    with Path(__file__).with_name("orders.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(orders())
