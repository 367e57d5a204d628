"""Openings that a model continues: sixteen subjects, nine each, none of which says whether it will be good or bad."""

_OPENINGS = """
The film opens with | The story follows a young | In the second half of the movie, the director | The lead actor plays the part
By the time the credits rolled, I | The script was written by | Compared with the first film, this one | The camera work throughout the picture
The sequel picks up where
My stay at the hotel was | When we checked in, the staff | The room on the third floor | From the window of our room we | Breakfast at the guest house
The bed in the small room | At the reception they told us | The pool behind the hotel | After two nights in the hostel I
We ordered the soup and the main course | The new restaurant around the corner | Our waiter that evening | The pizza from the place downtown
The menu has changed since | For dessert we shared | The coffee at this cafe | The cook came out to | Lunch at the canteen
I bought this phone last month and | After two weeks with the laptop, I think | The battery of this camera | The package arrived on Tuesday and
I have been using the app since | The screen of the tablet | The new version of the software | These headphones | The printer in our office
Our trip to the coast | The flight to the capital | The bus ride across the country | On the ferry to the island | The guide of our walking tour
The airport in the south | The road through the mountains | Our second day in the old town | The night train to the border
My first week at the job | The meeting this morning | My manager told me that | The project that we finished in May | The new office has
Our team has been | The training course last week | My colleague from the second floor | The contract that I signed
The book is about a family that | The author's latest novel | The second chapter | The poems in this collection | This biography of a painter
The ending of the story | The book that you lent me | The short stories by | Reading this essay, one
The concert last night was | Her new album sounds | The band played | The orchestra's first evening | The singer on the small stage
The song that he wrote for | This recording of the symphony | The festival in the park | The piano lesson
The match on Saturday | Our goalkeeper | In the second half the team | The new coach of the club | The referee decided | The runner from the north
After the final whistle | The stadium on the edge of town | The tennis match lasted
The weather this week | The winter in this valley | After the storm last night, the | The forecast for the weekend | The morning was
The rain on our camping trip | The summer we spent at the lake | The snow in the garden | The wind at the beach
The neighbourhood park in the morning | The apartment we moved into | Our neighbours from upstairs | The street where I live | The new playground
The building across the road | The market on the square | The people in our village | The library in our district
The teacher of my evening class | My daughter's school | The lecture on Monday | The students in the first row | The exam in June | My language course
The university in the city | The professor explained | The homework for tomorrow
The garden behind the house | The tomatoes that I planted | My old apple tree | The roses by the gate | The new lawn | The flowers on the balcony
The soil in this bed | The hedge along the path | The greenhouse we built
The customer service told me | The shop on the corner | I ordered the shoes on Monday and | The jacket that I tried on | The sale at the department store
The delivery of our sofa | The receipt that they gave me | The cashier at the supermarket | The website of the store
The doctor said that | My visit to the dentist | The nurse at the front desk | The hospital where my aunt | The waiting room | The new glasses
After the operation, he | The pharmacy near the station | My back has been
The museum's new exhibition | The painting in the last room | The tour of the castle | The play at the small theatre | The dancers on the stage
The statue in the main hall | The photographs on the wall | The tickets for the show | The opening of the gallery
"""
OPENINGS = [" ".join(one.split()) for line in _OPENINGS.strip().splitlines() for one in line.split("|")]
DEVELOPMENT, EVIDENCE = OPENINGS[::9] + OPENINGS[4::9], [o for i, o in enumerate(OPENINGS) if i % 9 not in (0, 4)]
"""32 to choose doses and settings on, 112 that the evidence comes from; both of all subjects."""

_SUBJECTS = """
the hotel by the lake | the new restaurant | the film that we saw | the trip to the islands | the concert in the park | my new job
the phone that I bought | the evening class | the book that you lent me | the flat that we rented | the walking tour | the football match
the museum in the old town | the service at the bank
"""
_KIND = (
    "I loved {} from the first minute. It",
    "What a wonderful surprise {} was! We",
    "{} was a pure joy, and we",
    "Everybody was delighted with {}, because it",
)
_HARSH = (
    "I hated {} from the first minute. It",
    "What a terrible disappointment {} was! We",
    "{} was a complete disaster, and we",
    "Everybody complained about {}, because it",
)
SUBJECTS = [" ".join(one.split()) for one in _SUBJECTS.replace("\n", "|").split("|") if one.strip()]


def _framed(frames: tuple[str, ...]) -> list[str]:
    texts = [frame.format(subject) for subject in SUBJECTS for frame in frames]
    return [text[0].upper() + text[1:] for text in texts]


EASY, HARD = _framed(_KIND), _framed(_HARSH)
"""56 openings that say already what is asked for, and 56 that say the opposite, of the same subjects."""
