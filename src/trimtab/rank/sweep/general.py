"""Plain text of many kinds, written for this purpose: how much worse a model becomes on it is what it has forgotten.

About a thousand tokens: enough to see forgetting, and little beside the held-out rows. Losses on it compare models with
each other; they say nothing of a model alone.
"""

from __future__ import annotations

TEXTS = (
    "Water boils at a lower temperature on a mountain than at the coast, because the air above it presses down less. A "
    "cook who lives high up learns to give potatoes and beans more time, and bakers there use a little less yeast, "
    "since dough rises faster in thin air.",
    "The old lighthouse keeper climbed the stairs twice each night. He trimmed the lamp, wound the clockwork that turned "
    "the lens, and wrote the weather into a book: wind from the north-west, heavy sea, two ships passing. When the "
    "light was made automatic he kept the habit of waking at three.",
    "To divide a fraction by another, turn the second one upside down and multiply. Three quarters divided by one half "
    "is three quarters times two, which is one and a half. The rule is easy to remember and easy to forget the reason "
    "for: dividing by a half asks how many halves there are.",
    'def mean(values):\n    """Return the arithmetic mean of a list of numbers."""\n    if not values:\n        raise '
    'ValueError("mean of an empty list")\n    total = 0.0\n    for value in values:\n        total += value\n    return '
    "total / len(values)",
    '"Have you seen my keys?" asked Anna. "They were on the table this morning," her brother said, "next to the blue '
    'bowl." She looked again, moved the newspaper, and laughed. "I put them in my coat so that I would not lose them."',
    "Dear Mr. Alvarez, thank you for your letter of the fourth of May. We are sorry that the chair arrived with a broken "
    "leg. A new one will be sent to you within ten days, free of charge; please give the damaged one to the driver. "
    "Yours sincerely, the customer service.",
    "Trees take carbon dioxide from the air and water from the soil, and with the energy of sunlight they build sugar "
    "from them. The oxygen that is left over goes back into the air. At night they breathe as animals do, and use up a "
    "part of the sugar that they have made during the day.",
    "Ingredients for four: 300 g of flour, 3 eggs, half a litre of milk, a pinch of salt, butter for the pan. Whisk the "
    "eggs with the milk and the salt, add the flour slowly, and let the batter rest for twenty minutes. Fry thin "
    "pancakes on both sides until they are golden.",
    "The city council voted on Tuesday to close the market square to cars from next spring. Shop owners had feared to "
    "lose customers, but a trial last summer brought more visitors than in the year before. Buses will stop at both "
    "ends of the square, and deliveries remain possible until eleven in the morning.",
    "In the seventeenth century few people owned a clock that showed minutes. Trade, prayer and work followed the sun "
    "and the bells. Only when railways needed timetables did whole countries agree on one time, and even then some "
    "towns kept their own for decades, ten minutes ahead of the station.",
    "Question: Which planet of the solar system is the largest? Answer: Jupiter. Its diameter is about eleven times that "
    "of the Earth, and its mass is more than twice that of all other planets together. Question: How many moons does "
    "Mars have? Answer: Two; they are called Phobos and Deimos.",
    "If the train from Lyon is late, take the next one, which leaves platform six at twenty past nine. Your ticket is "
    "valid on both. At the border the conductor may ask for your passport. The journey takes five hours, and there is a "
    "restaurant car between the second and the third carriage.",
)
