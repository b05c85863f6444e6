"""The sentences whose embeddings the demo compares: many topics, a few pairs that mean nearly the same."""

from __future__ import annotations

from typing import Final

SENTENCES: Final = (
    "A fox trotted across the frozen pond just before sunrise.",
    "Shortly before dawn, a fox walked over the ice of the lake.",
    "The central bank left its interest rate unchanged at 4.25 percent.",
    "Borrowing costs stay where they are, the monetary authority announced.",
    "How do I remove a red wine stain from a wool carpet?",
    "What is the best way to get spilled merlot out of a rug?",
    "for i in range(10): print(i * i)",
    "A loop that prints the squares of the first ten whole numbers.",
    "Marta Lindqvist and Kofi Adeyemi founded the choir in 1987.",
    "Simmer the lentils with bay leaf and cumin until they are tender.",
    "Add the flour slowly, or the batter will have lumps.",
    "The train to Ljubljana leaves from platform 7 at 14:35.",
    "Is there a later connection, and do I have to reserve a seat?",
    "The patient reports a dull pain in the left knee after climbing stairs.",
    "Light takes about eight minutes and twenty seconds from the Sun to the Earth.",
    "Jupiter has more moons than you can comfortably name from memory.",
    "Our goalkeeper saved two penalties and we still lost.",
    "The home team was beaten although its keeper stopped a pair of spot kicks.",
    "Rent is due on the first of the month; after the fifth a fee of 25 euros applies.",
    "The tenant shall return all keys when the lease ends.",
    "SELECT name, SUM(total) FROM orders GROUP BY name HAVING SUM(total) > 1000;",
    "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
    "My program crashes because I add a number to a piece of text.",
    "No.",
    "I would rather not talk about it today.",
    "She laughed until the tears ran down her face.",
    "He was so sad that nobody at the table dared to speak.",
    "A lossless codec gives back every bit; a lossy one decides which bits you will not miss.",
    "Four bits a weight are enough for most layers, but not for all of them.",
    "The violin was tuned a quarter tone too high, and everyone noticed.",
    "Glaciers in the valley have retreated by roughly 900 metres since 1950.",
    "When the ice of a mountain valley melts, the rivers below first swell and later run dry.",
    "Does the warranty cover water damage if the phone fell into a puddle?",
    "3.14159, 2.71828, 1.61803 and 1.41421 are four numbers that mathematicians like.",
    "Die Bibliothek ist am Montag geschlossen, which is German for: no books on Monday.",
    "On the morning on which the old ferry made its last crossing, the whole village stood on the quay: the baker"
    " with flour on his sleeves, the two sisters who had kept the post office since their father died, the "
    "schoolmaster and his nineteen pupils, a dog that belonged to nobody, three fishermen who claimed not to "
    "care, the doctor from the next bay, a reporter with a borrowed camera, and, a little apart from the others, "
    "the engineer who had drawn the bridge, counted its rivets, argued about its price for eleven years and now, "
    "seeing the small white ship turn once more in front of the lighthouse, sound its horn, and come home slowly "
    "against the tide, with flags from bow to stern and every one of its wooden benches full, wished for a moment"
    " that he had never learned to calculate, because a bridge, he thought, asks nobody to wait, tells nobody the"
    " news, carries no coffee from the galley, knows no captain by his first name and no passenger by his cough, "
    "and although it would bring the ambulance in six minutes, the bread before seven, the pupils home in every "
    "storm, and the price of timber down by a third, it would never, not once in the hundred years for which he "
    "had designed it, be late, be early, be greeted, or be missed; and then the rope flew, the gangway fell, the "
    "people cheered, somebody handed him a paper cup of sour wine, and he drank it to the end, folded the cup, "
    "put it into his pocket, and walked home over his bridge.",
)
