"""The demo's tools and tasks as hand-written tables.

Each task is `(request, values)`, the values in the order of the tool's parameters. Held-out tasks use the same tools
but no string, number, list or date of a training task (options and booleans are necessarily shared).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Task = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Tool:
    """A tool: its name, its parameters in order (name → type) and its tasks.

    The model sees the names only: how a time, a date, an option or a currency is written, it learns from the
    demonstrations. A type is ``str``, ``int``, ``float``, ``bool``, ``list[str]``, ``list[int]``, ``date``
    (``YYYY-MM-DD``), ``time`` (``HH:MM``, 24 hours) or options joined by ``|``.
    """

    name: str
    parameters: dict[str, str]
    train: list[Task] = field(repr=False)
    heldout: list[Task] = field(repr=False)

    @property
    def signature(self) -> str:
        """What a prompt says about the tool, for example ``set_alarm(at, label)``."""
        return f"{self.name}({', '.join(self.parameters)})"


TOOLS: list[Tool] = [
    Tool(
        "set_alarm",
        {"at": "time", "label": "str"},
        train=[
            ("Wake me up at half past six for the gym.", ("06:30", "gym")),
            ("Set an alarm for 9:15 pm called medicine.", ("21:15", "medicine")),
            (
                "I need an alarm at quarter to five in the afternoon, label it school pickup.",
                ("16:45", "school pickup"),
            ),
            ("alarm 8 am, standup", ("08:00", "standup")),
            ("Can you ring at 10:20 tonight to remind me of the laundry?", ("22:20", "laundry")),
        ],
        heldout=[
            ("Please wake me at 5:40 in the morning for the airport.", ("05:40", "airport")),
            ("Alarm at half past three in the afternoon, call it violin.", ("15:30", "violin")),
        ],
    ),
    Tool(
        "convert_currency",
        {"amount": "float", "source": "str", "target": "str"},
        train=[
            ("How much is 250 euros in US dollars?", (250, "EUR", "USD")),
            ("Convert 99.5 British pounds to euros.", (99.5, "GBP", "EUR")),
            ("I have 12000 yen, what is that in pounds?", (12000, "JPY", "GBP")),
            ("18.75 dollars in yen, please", (18.75, "USD", "JPY")),
            ("What would 640 euros give me in British pounds?", (640, "EUR", "GBP")),
        ],
        heldout=[
            ("Change 480 Swiss francs into Canadian dollars.", (480, "CHF", "CAD")),
            ("What are 33.2 Australian dollars worth in Indian rupees?", (33.2, "AUD", "INR")),
        ],
    ),
    Tool(
        "send_message",
        {"recipient": "str", "text": "str", "urgent": "bool"},
        train=[
            ("Text Maria that I am running late. No rush.", ("Maria", "I am running late", False)),
            ("Urgent message to Tom: call the office.", ("Tom", "call the office", True)),
            ("Tell Dr. Lee the results are ready, it can wait.", ("Dr. Lee", "the results are ready", False)),
            ("Let Priya know the server is down, this is urgent!", ("Priya", "the server is down", True)),
            ("Write to Grandma: happy birthday. It is not urgent.", ("Grandma", "happy birthday", False)),
        ],
        heldout=[
            ("Urgently tell Kenji the train is cancelled.", ("Kenji", "the train is cancelled", True)),
            ("Message Sofia: dinner is at my place. Not urgent.", ("Sofia", "dinner is at my place", False)),
        ],
    ),
    Tool(
        "create_event",
        {"title": "str", "day": "date", "all_day": "bool"},
        train=[
            ("Put the dentist on March 5, 2026, not the whole day.", ("dentist", "2026-03-05", False)),
            ("Add an all-day event called offsite on 12 June 2026.", ("offsite", "2026-06-12", True)),
            ("Block all of July 4th 2026 for the family picnic.", ("family picnic", "2026-07-04", True)),
            (
                "Calendar: budget review, 28 February 2026, only part of the day.",
                ("budget review", "2026-02-28", False),
            ),
            (
                "I have a piano lesson on October 9, 2026; it does not take all day.",
                ("piano lesson", "2026-10-09", False),
            ),
        ],
        heldout=[
            ("Schedule the wedding for 22 August 2026, all day.", ("wedding", "2026-08-22", True)),
            ("Put car service on April 17, 2026, not all day.", ("car service", "2026-04-17", False)),
        ],
    ),
    Tool(
        "set_thermostat",
        {"celsius": "float", "mode": "heat|cool|auto"},
        train=[
            ("Heat the house to 21 degrees.", (21, "heat")),
            ("It is too hot, cool it down to 18.5.", (18.5, "cool")),
            ("Thermostat to 20 on automatic.", (20, "auto")),
            ("Please warm the place up to 22.5 degrees Celsius.", (22.5, "heat")),
            ("Could you set cooling to 24?", (24, "cool")),
        ],
        heldout=[
            ("Make it warmer, heat to 19.5 degrees.", (19.5, "heat")),
            ("Cool the rooms to 23 degrees.", (23, "cool")),
        ],
    ),
    Tool(
        "play_music",
        {"artist": "str", "shuffle": "bool", "volume": "int"},
        train=[
            ("Play some Nina Simone on shuffle at volume 30.", ("Nina Simone", True, 30)),
            ("Put on Radiohead, in order, volume 55.", ("Radiohead", False, 55)),
            ("I want to hear Bach without shuffling, volume 15.", ("Bach", False, 15)),
            ("Shuffle Daft Punk, loud: volume 80.", ("Daft Punk", True, 80)),
            ("Can you shuffle songs by Adele at volume 42?", ("Adele", True, 42)),
        ],
        heldout=[
            ("Shuffle Miles Davis at volume 25.", ("Miles Davis", True, 25)),
            ("Play Coldplay in order, volume 60.", ("Coldplay", False, 60)),
        ],
    ),
    Tool(
        "add_items",
        {"to": "shopping|packing|todo", "items": "list[str]"},
        train=[
            ("Add milk and eggs to the shopping list.", ("shopping", ["milk", "eggs"])),
            ("For the trip pack socks, a charger and sunscreen.", ("packing", ["socks", "charger", "sunscreen"])),
            ("I have to water the plants, put that on my to-dos.", ("todo", ["water the plants"])),
            ("We are out of rice, onions and butter.", ("shopping", ["rice", "onions", "butter"])),
            ("Put pay rent and call mom on the todo list.", ("todo", ["pay rent", "call mom"])),
        ],
        heldout=[
            ("Buy bread, cheese and apples.", ("shopping", ["bread", "cheese", "apples"])),
            ("Packing list: passport and umbrella.", ("packing", ["passport", "umbrella"])),
        ],
    ),
    Tool(
        "set_light",
        {"room": "str", "brightness": "int", "color": "warm|cold|red"},
        train=[
            ("Dim the bedroom to 20 percent, warm light.", ("bedroom", 20, "warm")),
            ("Kitchen lights at 90%, cold white.", ("kitchen", 90, "cold")),
            ("Turn the hallway red at 10 percent brightness.", ("hallway", 10, "red")),
            ("Give me a warm 45 percent in the living room.", ("living room", 45, "warm")),
            ("Make the garage bright and cold, 100 percent.", ("garage", 100, "cold")),
        ],
        heldout=[
            ("Cold light in the bathroom at 75 percent.", ("bathroom", 75, "cold")),
            ("Set the study to a warm 35 percent.", ("study", 35, "warm")),
        ],
    ),
    Tool(
        "book_table",
        {"restaurant": "str", "guests": "int", "outdoor": "bool"},
        train=[
            ("Book a table for four at Luigi's, outside.", ("Luigi's", 4, True)),
            ("Reserve Sakura for 2 people, indoors please.", ("Sakura", 2, False)),
            ("We are seven and want to sit on the terrace at Casa Verde.", ("Casa Verde", 7, True)),
            ("Get us an inside table for 5 at The Anchor.", ("The Anchor", 5, False)),
            ("A table at Bistro Nord for ten, outdoors.", ("Bistro Nord", 10, True)),
        ],
        heldout=[
            ("Reserve an indoor table for three at Golden Fork.", ("Golden Fork", 3, False)),
            ("Book Mesa Azul for 6 guests, outdoors.", ("Mesa Azul", 6, True)),
        ],
    ),
    Tool(
        "translate",
        {"text": "str", "language": "fr|de|es"},
        train=[
            ("How do you say good morning in French?", ("good morning", "fr")),
            ("Translate where is the station into German.", ("where is the station", "de")),
            ("What is thank you very much in Spanish?", ("thank you very much", "es")),
            ("I want the bill, please, in French.", ("the bill, please", "fr")),
            ("Spanish for my name is Alex?", ("my name is Alex", "es")),
        ],
        heldout=[
            ("Translate see you tomorrow into German.", ("see you tomorrow", "de")),
            ("How do I say I am lost in Spanish?", ("I am lost", "es")),
        ],
    ),
    Tool(
        "get_weather",
        {"city": "str", "days": "int", "unit": "celsius|fahrenheit"},
        train=[
            ("Weather in Paris for the next 3 days in Celsius.", ("Paris", 3, "celsius")),
            ("What will Chicago be like over the coming five days? Fahrenheit please.", ("Chicago", 5, "fahrenheit")),
            ("Give me a one-day forecast for Oslo in Celsius.", ("Oslo", 1, "celsius")),
            ("Do I need a coat in Boston during the next 2 days? I think in Fahrenheit.", ("Boston", 2, "fahrenheit")),
            ("10 day forecast, Cape Town, celsius", ("Cape Town", 10, "celsius")),
        ],
        heldout=[
            ("Forecast for Lima for the next 4 days in Celsius.", ("Lima", 4, "celsius")),
            ("How is Denver over the next seven days, in Fahrenheit?", ("Denver", 7, "fahrenheit")),
        ],
    ),
    Tool(
        "transfer_money",
        {"to": "str", "amount": "float", "instant": "bool"},
        train=[
            ("Send 40 euros to Anna right away.", ("Anna", 40, True)),
            ("Transfer 1250.5 to the landlord, standard speed.", ("landlord", 1250.5, False)),
            ("I owe Ben 15.8, pay him instantly.", ("Ben", 15.8, True)),
            ("Move 300 to savings, no hurry.", ("savings", 300, False)),
            ("Pay the electrician 89.99 immediately.", ("electrician", 89.99, True)),
        ],
        heldout=[
            ("Transfer 72.5 to Clara instantly.", ("Clara", 72.5, True)),
            ("Pay the gardener 110, standard speed.", ("gardener", 110, False)),
        ],
    ),
    Tool(
        "find_flights",
        {"origin": "str", "destination": "str", "day": "date"},
        train=[
            ("Flights from Berlin to Rome on May 14, 2026.", ("Berlin", "Rome", "2026-05-14")),
            ("I want to fly to Tokyo from Seattle on 3 November 2026.", ("Seattle", "Tokyo", "2026-11-03")),
            ("Find me a plane from Madrid to Dublin, January 20th 2026.", ("Madrid", "Dublin", "2026-01-20")),
            ("Are there flights Cairo to Athens on September 8, 2026?", ("Cairo", "Athens", "2026-09-08")),
            ("Leaving Vienna for Lisbon on 25 December 2026.", ("Vienna", "Lisbon", "2026-12-25")),
        ],
        heldout=[
            ("Find flights from Prague to Naples on March 11, 2026.", ("Prague", "Naples", "2026-03-11")),
            ("I need to get from Miami to Bogota on 19 July 2026.", ("Miami", "Bogota", "2026-07-19")),
        ],
    ),
    Tool(
        "log_workout",
        {"activity": "run|swim|cycle", "kilometers": "float", "minutes": "int"},
        train=[
            ("I ran 5 kilometers in 28 minutes.", ("run", 5, 28)),
            ("Log a bike ride: 32.4 km, 75 minutes.", ("cycle", 32.4, 75)),
            ("Swam 1.5 km in 40 minutes today.", ("swim", 1.5, 40)),
            ("Add my 10.2 km run, it took 54 minutes.", ("run", 10.2, 54)),
            ("Cycled 18 km, took me an hour.", ("cycle", 18, 60)),
        ],
        heldout=[
            ("I swam 2.2 km in 55 minutes.", ("swim", 2.2, 55)),
            ("Log a run of 7.5 kilometers in 41 minutes.", ("run", 7.5, 41)),
        ],
    ),
    Tool(
        "compute_statistic",
        {"numbers": "list[int]", "statistic": "mean|median|max"},
        train=[
            ("What is the average of 4, 8 and 15?", ([4, 8, 15], "mean")),
            ("Find the largest of 23, 7, 91 and 40.", ([23, 7, 91, 40], "max")),
            ("Median of 3, 12, 5, please.", ([3, 12, 5], "median")),
            ("Which is the biggest number: 66, 18 or 52?", ([66, 18, 52], "max")),
            ("Give me the mean of 10, 20, 60 and 70.", ([10, 20, 60, 70], "mean")),
        ],
        heldout=[
            ("Average 9, 27 and 36.", ([9, 27, 36], "mean")),
            ("What is the median of 14, 2 and 31?", ([14, 2, 31], "median")),
        ],
    ),
]
