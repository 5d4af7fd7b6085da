"""Grade-school word problems in GSM8K's form, drawn from templates; every word here was written for this project.

A template returns its question, its worked steps and the answer. In a step, ``[$3*4=12]`` stands for GSM8K's
calculator annotation ``3*4=$<<3*4=12>>12`` (the dollar sign is optional); `draw_problems` expands it.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

Draft = tuple[str, list[str], int]  # question, steps, answer
Template = Callable[["Draw"], Draft]

SHE = "Ada Bea Clara Dina Elif Farah Grace Hana Ines Julia Kira Lucy Mina Nora Olga Priya Rosa Sara Tara Uma Vera Zoe"
HE = "Adam Boris Carl Dev Emil Felix George Hugo Ivan Jonas Karim Leo Marco Nils Omar Paul Ravi Sam Theo Victor Yusuf"
THINGS = "pencils stickers marbles buttons shells beads stamps badges crayons coins erasers balloons postcards stones"
FOODS = "apples pears plums oranges lemons peaches cookies muffins rolls figs tarts cupcakes pies pancakes"
BAKED = "cookies muffins rolls tarts cupcakes pies pancakes scones buns waffles"
PLANTS = "tomato bean pepper melon pumpkin strawberry cucumber pea"
DAYS = "Monday Tuesday Wednesday Thursday Friday"
WEARS = "jacket coat bag lamp clock chair helmet tent watch radio"
GROUPS = "friends cousins neighbors teammates classmates"
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}

TEMPLATES: list[Template] = []


class Person(NamedTuple):
    """A name and its pronouns; ``He`` opens a sentence."""

    name: str
    he: str
    his: str

    @property
    def He(self) -> str:  # noqa: N802
        """The pronoun with a capital."""
        return self.he.capitalize()


class Draw:
    """Names, things and numbers from one seeded stream."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def template(self) -> Template:
        """One of the templates, all equally likely."""
        return self._random.choice(TEMPLATES)

    def number(self, low: int, high: int, step: int = 1) -> int:
        """One of ``low``, ``low + step``, ... up to and with ``high``."""
        return self._random.randrange(low, high + 1, step)

    def pick(self, *options: str) -> str:
        """One of the options; a lone option is a list of words."""
        return self._random.choice(options if len(options) > 1 else options[0].split())

    def two(self, options: str) -> list[str]:
        """Two different words of a blank-separated list."""
        return self._random.sample(options.split(), 2)

    def people(self, count: int) -> list[Person]:
        """Draw that many different people."""
        everyone = [Person(n, "she", "her") for n in SHE.split()] + [Person(n, "he", "his") for n in HE.split()]
        return self._random.sample(everyone, count)

    def person(self) -> Person:
        """Draw one person."""
        return self.people(1)[0]


def draw_problems(seed: int, count: int) -> list[dict[str, str]]:
    """``count`` problems with different questions, each ``{"question", "answer"}``; the seed decides all of them."""
    draw, problems = Draw(seed), dict[str, str]()
    while len(problems) < count:
        question, steps, answer = draw.template()(draw)
        worked = re.sub(r"\[(\$?)([^=\]]+)=(\d+)\]", r"\2=\1<<\2=\3>>\3", "\n".join(steps))
        problems.setdefault(question, f"{worked}\n#### {answer}")
    return [{"question": question, "answer": answer} for question, answer in problems.items()]


def template(function: Template) -> Template:
    """Add a template to the list problems are drawn from."""
    TEMPLATES.append(function)
    return function


@template
def _packs_and_gift(d: Draw) -> Draft:
    (a, b), things, packs, each = d.people(2), d.pick(THINGS), d.number(3, 9), d.number(4, 12)
    total, box = packs * each, d.pick("bags boxes packs tins")
    gift = d.number(2, total - 2)
    return (
        f"{a.name} buys {packs} {box} of {things} with {each} {things} in each. {a.He} gives {gift} of them to "
        f"{b.name}. {d.pick(f'How many {things} does {a.name} have left?', f'How many {things} does {a.he} keep?')}",
        [
            f"{a.name} buys [{packs}*{each}={total}] {things}.",
            f"After the gift {a.he} has [{total}-{gift}={total - gift}] {things}.",
        ],
        total - gift,
    )


@template
def _collection_grows(d: Draw) -> Draft:
    a, things, had, days, each = d.person(), d.pick(THINGS), d.number(10, 60), d.number(3, 9), d.number(2, 9)
    found, lost = days * each, d.number(2, 8)
    return (
        f"{a.name} has {had} {things} in {a.his} collection. For {days} days {a.he} finds {each} new ones every day, "
        f"but {lost} {things} get lost. How many {things} are in the collection now?",
        [
            f"In {days} days {a.name} finds [{days}*{each}={found}] {things}.",
            f"With those {a.he} has [{had}+{found}={had + found}] {things}.",
            f"Without the lost ones that makes [{had + found}-{lost}={had + found - lost}] {things}.",
        ],
        had + found - lost,
    )


@template
def _shopping_change(d: Draw) -> Draft:
    a, (x, y), n, m = d.person(), d.two(FOODS), d.number(2, 9), d.number(2, 9)
    p, q, shop = d.number(2, 6), d.number(2, 6), d.pick("market", "bakery", "corner shop", "fair")
    bill = n * p + m * q
    note = (bill // 50 + 1) * 50
    return (
        f"At the {shop}, {a.name} buys {n} {x} at ${p} each and {m} {y} at ${q} each. {a.He} pays with ${note}. "
        f"How much change does {a.he} get{d.pick(' back?', '?')}",
        [
            f"The {x} cost [${n}*{p}={n * p}].",
            f"The {y} cost [${m}*{q}={m * q}].",
            f"Together they cost [${n * p}+{m * q}={bill}].",
            f"The change is [${note}-{bill}={note - bill}].",
        ],
        note - bill,
    )


@template
def _discount(d: Draw) -> Draft:
    a, thing, price, percent = d.person(), d.pick(WEARS), d.number(20, 200, 20), d.number(10, 50, 5)
    off, shipping = price * percent // 100, d.number(2, 15)
    return (
        f"{d.pick('A shop sells', 'An online store offers')} a {thing} for ${price}. Today it is {percent}% cheaper, "
        f"but delivery costs ${shipping}. How much does {a.name} pay for the {thing} and its delivery?",
        [
            f"The discount is [${price}*{percent}/100={off}].",
            f"The {thing} now costs [${price}-{off}={price - off}].",
            f"With delivery {a.name} pays [${price - off}+{shipping}={price - off + shipping}].",
        ],
        price - off + shipping,
    )


@template
def _two_rates_of_pay(d: Draw) -> Draft:
    a, rate, extra, n, m = d.person(), d.number(8, 20), d.number(2, 8), d.number(10, 35), d.number(2, 9)
    job = d.pick("waiter painter gardener cleaner driver baker tutor")
    late = rate + extra
    return (
        f"{a.name} works as a {job} for ${rate} an hour. On weekends {a.he} earns ${extra} more per hour. "
        f"How much does {a.he} earn in a week with {n} normal hours and {m} weekend hours?",
        [
            f"The normal hours bring [${rate}*{n}={rate * n}].",
            f"A weekend hour pays [${rate}+{extra}={late}].",
            f"The weekend hours bring [${late}*{m}={late * m}].",
            f"In total {a.name} earns [${rate * n}+{late * m}={rate * n + late * m}].",
        ],
        rate * n + late * m,
    )


@template
def _saving_up(d: Draw) -> Draft:
    a, thing, weekly, weeks, gift = d.person(), d.pick(WEARS), d.number(3, 15), d.number(4, 12), d.number(5, 30)
    saved, short = weekly * weeks + gift, d.number(5, 60)
    relative = d.pick("aunt uncle grandmother grandfather")
    return (
        f"{a.name} wants a {thing} that costs ${saved + short}. {a.He} saves ${weekly} a week for {weeks} weeks, and "
        f"{a.his} {relative} gives {a.name} ${gift}. How many dollars are still missing?",
        [
            f"{a.name} saves [${weekly}*{weeks}={weekly * weeks}].",
            f"With the gift {a.he} has [${weekly * weeks}+{gift}={saved}].",
            f"{a.He} still needs [${saved + short}-{saved}={short}].",
        ],
        short,
    )


@template
def _two_speeds(d: Draw) -> Draft:
    a, n, m, u, v = d.person(), d.number(2, 6), d.number(2, 6), d.number(10, 60, 5), d.number(10, 60, 5)
    how = d.pick("rides a bike", "drives a truck", "sails a boat", "drives a bus")
    return (
        f"{a.name} {how} at {u} km per hour for {n} hours. After a break {a.he} goes on at {v} km per hour for {m} "
        f"hours. How many kilometers is the whole trip?",
        [
            f"Before the break {a.name} covers [{u}*{n}={u * n}] km.",
            f"After the break {a.he} covers [{v}*{m}={v * m}] km.",
            f"The whole trip is [{u * n}+{v * m}={u * n + v * m}] km.",
        ],
        u * n + v * m,
    )


@template
def _equal_shares(d: Draw) -> Draft:
    a, foods, who, share, count = d.person(), d.pick(FOODS), d.pick(GROUPS), d.number(3, 9), d.number(3, 8)
    shared, eaten = share * count, d.number(2, 6)
    total = shared + eaten
    return (
        f"{a.name} has {total} {foods} and eats {eaten} of them. {d.pick('Then', 'Afterwards')} {a.he} shares the rest "
        f"equally among {count} {who}. How many {foods} does each of the {who} get?",
        [
            f"After eating, {a.name} has [{total}-{eaten}={shared}] {foods}.",
            f"Each of the {who} gets [{shared}/{count}={share}] {foods}.",
        ],
        share,
    )


@template
def _three_compared(d: Draw) -> Draft:
    (a, b, c), things, x, k = d.people(3), d.pick(THINGS), d.number(6, 30), d.number(2, 5)
    less = d.number(2, x)
    y = x * k
    z = y - less
    return (
        f"{a.name} has {x} {things}. {b.name} has {TIMES[k]} as many {things} as {a.name}, and {c.name} has {less} "
        f"fewer than {b.name}. How many {things} do the three have together?",
        [
            f"{b.name} has [{x}*{k}={y}] {things}.",
            f"{c.name} has [{y}-{less}={z}] {things}.",
            f"Together they have [{x}+{y}+{z}={x + y + z}] {things}.",
        ],
        x + y + z,
    )


@template
def _fractions_of_a_class(d: Draw) -> Draft:
    part, half, (sport, other) = d.number(2, 5), d.number(3, 12), d.two("football tennis chess hockey swimming judo")
    rest = 2 * half * (part - 1)
    total = rest * part // (part - 1)
    return (
        f"A {d.pick('class', 'school', 'club', 'camp')} has {total} children. {PARTS[part].capitalize()} of them "
        f"choose {sport}. Half of the others choose {other}. How many children choose {other}?",
        [
            f"There are [{total}/{part}={total // part}] children who choose {sport}.",
            f"The others are [{total}-{total // part}={rest}] children.",
            f"Half of them are [{rest}/2={rest // 2}] children.",
        ],
        rest // 2,
    )


@template
def _ages(d: Draw) -> Draft:
    (a, b, c), young, k, older = d.people(3), d.number(3, 12), d.number(2, 4), d.number(2, 9)
    years = d.number(2, 10)
    then = young * k + older + years
    return (
        f"{c.name} is {young} years old. {b.name} is {TIMES[k]} as old as {c.name}, and {a.name} is {older} years "
        f"older than {b.name}. How old will {a.name} be in {years} years?",
        [
            f"{b.name} is [{young}*{k}={young * k}] years old.",
            f"{a.name} is [{young * k}+{older}={young * k + older}] years old.",
            f"In {years} years {a.name} will be [{young * k + older}+{years}={then}].",
        ],
        then,
    )


@template
def _reading(d: Draw) -> Draft:
    a, early, days, pace, more = d.person(), d.number(5, 20), d.number(2, 6), d.number(8, 30), d.number(2, 9)
    read, rest = early * days, pace * more
    book = d.pick("novel book comic diary guide")
    return (
        f"{a.name} is reading a {book} of {read + rest} pages. In the first {days} days {a.he} reads {early} pages a "
        f"day, and after that {pace} pages a day. How many more days does {a.he} need to finish the {book}?",
        [
            f"In the first {days} days {a.name} reads [{early}*{days}={read}] pages.",
            f"There are [{read + rest}-{read}={rest}] pages left.",
            f"{a.He} needs [{rest}/{pace}={more}] more days.",
        ],
        more,
    )


@template
def _garden(d: Draw) -> Draft:
    a, plant, rows, each, crop = d.person(), d.pick(PLANTS), d.number(3, 9), d.number(4, 10), d.number(2, 9)
    total, lost = rows * each, d.number(2, 6)
    why = d.pick("dry out", "freeze", "are eaten by snails", "break in a storm")
    return (
        f"{a.name} plants {rows} rows of {plant} plants, {each} in a row. {lost} of the plants {why}. Each of the "
        f"others gives {crop} kilograms. How many kilograms does {a.name} harvest?",
        [
            f"{a.name} sets [{rows}*{each}={total}] plants.",
            f"After the loss there are [{total}-{lost}={total - lost}] plants.",
            f"They give [{total - lost}*{crop}={(total - lost) * crop}] kilograms.",
        ],
        (total - lost) * crop,
    )


@template
def _recipe(d: Draw) -> Draft:
    a, foods, cups, times, have = d.person(), d.pick(BAKED), d.number(3, 7), d.number(3, 9), d.number(2, 7)
    stuff, need = d.pick("flour sugar milk oats rice"), cups * times
    return (
        f"One tray of {foods} takes {cups} cups of {stuff}. {a.name} wants to make {times} trays and has {have} cups "
        f"of {stuff} at home. How many more cups of {stuff} does {a.he} have to buy?",
        [
            f"For {times} trays {a.name} needs [{cups}*{times}={need}] cups of {stuff}.",
            f"{a.He} has to buy [{need}-{have}={need - have}] cups.",
        ],
        need - have,
    )


@template
def _fence(d: Draw) -> Draft:
    a, x, y, price = d.person(), d.number(5, 30), d.number(5, 30), d.number(2, 12)
    around, place = 2 * (x + y), d.pick("garden field yard playground meadow")
    return (
        f"{a.name} puts a fence around a {place} that is {x} meters long and {y} meters wide. One meter of fence costs "
        f"${price}. What does the fence cost?",
        [
            f"Length and width together are [{x}+{y}={x + y}] meters.",
            f"The fence is [2*{x + y}={around}] meters long.",
            f"It costs [${around}*{price}={around * price}].",
        ],
        around * price,
    )


@template
def _tiles(d: Draw) -> Draft:
    x, y, box, boxes = d.number(3, 9), d.number(3, 9), d.number(2, 8), d.number(3, 8)
    room, price = d.pick("kitchen bathroom hall cellar balcony"), d.number(3, 9)
    return (
        f"The floor of a {room} measures {x} meters by {y} meters. Tiles cost ${price} per square meter, and a worker "
        f"takes ${box} per square meter to lay them. What do {boxes} such floors cost in all?",
        [
            f"One floor has [{x}*{y}={x * y}] square meters.",
            f"Each square meter costs [${price}+{box}={price + box}].",
            f"One floor costs [${x * y}*{price + box}={x * y * (price + box)}].",
            f"All floors cost [${x * y * (price + box)}*{boxes}={x * y * (price + box) * boxes}].",
        ],
        x * y * (price + box) * boxes,
    )


@template
def _stops(d: Draw) -> Draft:
    start, on, off, more = d.number(20, 60), d.number(3, 15), d.number(3, 15), d.number(3, 15)
    ride = d.pick("bus train tram ferry")
    one, two = start - off + on, start - off + on + more
    return (
        f"A {ride} leaves with {start} people. At the first stop {off} people get off and {on} get on. At the second "
        f"stop {more} more get on. How many people are on the {ride} then?",
        [
            f"At the first stop [{start}-{off}={start - off}] people stay on the {ride}.",
            f"With the new ones there are [{start - off}+{on}={one}] people.",
            f"After the second stop there are [{one}+{more}={two}] people.",
        ],
        two,
    )


@template
def _eggs_by_the_dozen(d: Draw) -> Draft:
    a, hens, days, price = d.person(), d.number(12, 48, 12), d.number(2, 6), d.number(2, 6)
    eggs = hens * days
    bird = d.pick("hens ducks geese")
    return (
        f"{a.name} keeps {hens} {bird}, and each lays an egg a day. {a.He} sells the eggs of {days} days at ${price} "
        f"per dozen. How much money does {a.he} make?",
        [
            f"In {days} days the {bird} lay [{hens}*{days}={eggs}] eggs.",
            f"That is [{eggs}/12={eggs // 12}] dozen.",
            f"{a.name} makes [${eggs // 12}*{price}={eggs // 12 * price}].",
        ],
        eggs // 12 * price,
    )


@template
def _tickets(d: Draw) -> Draft:
    adult, child, n, m = d.number(6, 20, 2), d.number(2, 5), d.number(2, 6), d.number(2, 9)
    place, maps, fee = d.pick("zoo museum circus theater pool"), d.number(2, 6), d.number(2, 4)
    entry = n * adult + m * child
    return (
        f"At the {place} a ticket costs ${adult} for adults and ${child} for children. A group of {n} adults and {m} "
        f"children also buys {maps} maps at ${fee} each. How much does the group pay?",
        [
            f"The adults pay [${n}*{adult}={n * adult}].",
            f"The children pay [${m}*{child}={m * child}].",
            f"The maps cost [${maps}*{fee}={maps * fee}].",
            f"The group pays [${n * adult}+{m * child}+{maps * fee}={entry + maps * fee}].",
        ],
        entry + maps * fee,
    )


@template
def _library(d: Draw) -> Draft:
    shelves, each, out, back = d.number(4, 12), d.number(15, 40), d.number(20, 55), d.number(4, 18)
    total, what = shelves * each, d.pick("books films maps records")
    return (
        f"A library has {shelves} shelves with {each} {what} each. In the morning {out} {what} are borrowed, and in "
        f"the afternoon {back} come back. How many {what} are in the library in the evening?",
        [
            f"The library owns [{shelves}*{each}={total}] {what}.",
            f"At noon there are [{total}-{out}={total - out}] {what}.",
            f"In the evening there are [{total - out}+{back}={total - out + back}] {what}.",
        ],
        total - out + back,
    )


@template
def _leaky_tank(d: Draw) -> Draft:
    flow, leak, minutes = d.number(8, 25), d.number(2, 6), d.number(5, 20)
    what, start = d.pick("tank pool barrel pond"), d.number(10, 90, 10)
    net = flow - leak
    return (
        f"A {what} holds {start} liters. A pipe adds {flow} liters a minute, but {leak} liters a minute leak out. How "
        f"many liters are in the {what} after {minutes} minutes?",
        [
            f"Every minute the {what} gains [{flow}-{leak}={net}] liters.",
            f"In {minutes} minutes it gains [{net}*{minutes}={net * minutes}] liters.",
            f"Then it holds [{start}+{net * minutes}={start + net * minutes}] liters.",
        ],
        start + net * minutes,
    )


@template
def _minutes_left(d: Draw) -> Draft:
    a, hours, x, y = d.person(), d.number(2, 4), d.number(15, 45, 5), d.number(10, 40, 5)
    left = hours * 60 - x - y
    one, two = d.pick("cleaning cooking painting reading"), d.pick("homework shopping music gardening")
    return (
        f"{a.name} has {hours} hours before {d.pick('dinner', 'the game', 'the party', 'bedtime')}. {a.He} spends {x} "
        f"minutes on {one} and {y} minutes on {two}. How many minutes are left?",
        [
            f"{a.name} has [{hours}*60={hours * 60}] minutes.",
            f"{a.He} spends [{x}+{y}={x + y}] minutes.",
            f"There are [{hours * 60}-{x + y}={left}] minutes left.",
        ],
        left,
    )


@template
def _game_points(d: Draw) -> Draft:
    a, wins, win, losses, loss = d.person(), d.number(4, 12), d.number(5, 15), d.number(2, 5), d.number(2, 4)
    game = d.pick("board game", "card game", "quiz", "video game")
    plus, minus = wins * win, losses * loss
    return (
        f"In a {game} every right move brings {win} points and every wrong one costs {loss} points. {a.name} makes "
        f"{wins} right moves and {losses} wrong ones. How many points does {a.he} have at the end?",
        [
            f"The right moves bring [{wins}*{win}={plus}] points.",
            f"The wrong moves cost [{losses}*{loss}={minus}] points.",
            f"{a.name} has [{plus}-{minus}={plus - minus}] points.",
        ],
        plus - minus,
    )


@template
def _fewer_the_next_day(d: Draw) -> Draft:
    a, foods, part, (one, two) = d.person(), d.pick(FOODS), d.number(2, 5), d.two(DAYS)
    sold, price = part * d.number(4, 20), d.number(2, 5)
    less = sold // part
    return (
        f"On {one} {a.name} sells {sold} {foods}, and on {two} only {PARTS[part]} as many. Each of the {foods} costs "
        f"${price}. How much money does {a.he} take on the two days?",
        [
            f"On {two} {a.name} sells [{sold}/{part}={less}] {foods}.",
            f"On both days {a.he} sells [{sold}+{less}={sold + less}] {foods}.",
            f"{a.He} takes [${sold + less}*{price}={(sold + less) * price}].",
        ],
        (sold + less) * price,
    )


@template
def _profit(d: Draw) -> Draft:
    a, foods, cost, more, n = d.person(), d.pick(BAKED), d.number(2, 6), d.number(2, 6), d.number(10, 50)
    rent = d.number(5, min(30, more * n - 2))
    return (
        f"It costs {a.name} ${cost} to make one of {a.his} {foods}, and {a.he} sells them at ${cost + more} each. The "
        f"stall costs ${rent}. What is the profit if {a.he} sells {n} {foods}?",
        [
            f"Each of the {foods} brings [${cost + more}-{cost}={more}].",
            f"All of them bring [${more}*{n}={more * n}].",
            f"After the stall is paid the profit is [${more * n}-{rent}={more * n - rent}].",
        ],
        more * n - rent,
    )


@template
def _percent_pass(d: Draw) -> Draft:
    total, percent = d.number(40, 300, 20), d.number(20, 80, 5)
    exam, who = d.pick("test/students exam/students course/people contest/children").split("/")
    passed = total * percent // 100
    failed = total - passed
    again = d.number(2, min(15, failed - 2))
    return (
        f"There are {total} {who} in {d.pick('an autumn', 'a spring', 'a summer', 'a winter')} {exam}, and {percent}% "
        f"of them pass. Of the others, {again} try again. How many {who} neither pass nor try again?",
        [
            f"There are [{total}*{percent}/100={passed}] {who} who pass.",
            f"The others are [{total}-{passed}={failed}] {who}.",
            f"Of these [{failed}-{again}={failed - again}] do not try again.",
        ],
        failed - again,
    )


@template
def _laps(d: Draw) -> Draft:
    (a, b), lap, n, days, extra = d.people(2), d.number(100, 400, 50), d.number(3, 9), d.number(2, 6), d.number(2, 6)
    verb, mine = d.pick("runs swims walks skates"), n * days
    his = mine + extra
    return (
        f"One lap is {lap} meters. {a.name} {verb} {n} laps a day for {days} days, and {b.name} {verb} {extra} laps "
        f"more than {a.name} in all. How many meters does {b.name} cover?",
        [
            f"{a.name} {verb} [{n}*{days}={mine}] laps.",
            f"{b.name} {verb} [{mine}+{extra}={his}] laps.",
            f"That is [{his}*{lap}={his * lap}] meters.",
        ],
        his * lap,
    )


@template
def _monthly_plan(d: Draw) -> Draft:
    a, fee, unit, n, months = d.person(), d.number(5, 30), d.number(2, 5), d.number(2, 12), d.number(2, 12)
    what, use = d.pick("gym/classes pool/lessons cinema/films studio/courses").split("/")
    monthly = fee + unit * n
    return (
        f"A {what} charges ${fee} a month and ${unit} for each of its {use}. {a.name} takes {n} {use} every month. "
        f"What does {a.he} pay in {months} months?",
        [
            f"The {use} cost [${unit}*{n}={unit * n}] a month.",
            f"With the fee that is [${fee}+{unit * n}={monthly}] a month.",
            f"In {months} months {a.name} pays [${monthly}*{months}={monthly * months}].",
        ],
        monthly * months,
    )


@template
def _legs(d: Draw) -> Draft:
    a, n, m, gone = d.person(), d.number(4, 20), d.number(6, 20), d.number(2, 4)
    two, four = d.pick("hens ducks geese turkeys"), d.pick("cows sheep goats horses pigs")
    return (
        f"{a.name} has {n} {two} and {m} {four} on {a.his} farm. {a.He} sells {gone} of the {four}. How many legs do "
        f"the animals on the farm have now?",
        [
            f"There are [{m}-{gone}={m - gone}] {four} left.",
            f"They have [{m - gone}*4={(m - gone) * 4}] legs.",
            f"The {two} have [{n}*2={n * 2}] legs.",
            f"Together that makes [{(m - gone) * 4}+{n * 2}={(m - gone) * 4 + n * 2}] legs.",
        ],
        (m - gone) * 4 + n * 2,
    )


@template
def _album(d: Draw) -> Draft:
    a, what, each, full = d.person(), d.pick("photos stamps cards drawings"), d.number(4, 12), d.number(3, 9)
    pages, loose = full + d.number(2, 9), d.number(2, each - 1)
    return (
        f"An album has {pages} pages with room for {each} {what} each. {a.name} has filled {full} pages and has "
        f"{loose} more {what} to put in. For how many {what} is there room after that?",
        [
            f"There are [{pages}-{full}={pages - full}] empty pages.",
            f"They have room for [{pages - full}*{each}={(pages - full) * each}] {what}.",
            f"After that there is room for [{(pages - full) * each}-{loose}={(pages - full) * each - loose}] {what}.",
        ],
        (pages - full) * each - loose,
    )


@template
def _cut_pieces(d: Draw) -> Draft:
    a, piece, n, waste, price = d.person(), d.number(4, 25), d.number(4, 15), d.number(2, 9), d.number(2, 9)
    what, total = d.pick("ribbon rope wire cloth string"), piece * n
    return (
        f"{a.name} cuts {waste} centimeters off a {what} of {total + waste} centimeters and divides the rest into "
        f"pieces of {piece} centimeters. {a.He} sells every piece for ${price}. How much does {a.he} earn?",
        [
            f"The rest is [{total + waste}-{waste}={total}] centimeters long.",
            f"It gives [{total}/{piece}={n}] pieces.",
            f"{a.name} earns [${n}*{price}={n * price}].",
        ],
        n * price,
    )


@template
def _average(d: Draw) -> Draft:
    a, mean, x, y, gap = d.person(), d.number(60, 90), d.number(2, 15), d.number(2, 15), d.number(3, 20)
    one, two, three = mean + x, mean - y, mean - x + y
    subject = d.pick("math history music spelling science")
    return (
        f"{a.name} writes three {subject} tests and gets {one}, {two} and {three} points. How many points above the "
        f"class average of {mean - gap} is {a.his} own average?",
        [
            f"The points add up to [{one}+{two}+{three}={3 * mean}].",
            f"The average is [{3 * mean}/3={mean}] points.",
            f"That is [{mean}-{mean - gap}={gap}] points above the class.",
        ],
        gap,
    )


@template
def _pet_food(d: Draw) -> Draft:
    a, pets, n, cups = d.person(), d.pick("dogs cats rabbits hamsters parrots"), d.number(2, 6), d.number(2, 5)
    size, bags = d.number(2, 6), d.number(2, 6)
    daily = n * cups
    bag = daily * size
    return (
        f"{a.name} has {n} {pets}, and each of them eats {cups} cups of food a day. A bag holds {bag} cups. For how "
        f"many days do {bags} bags last?",
        [
            f"The {pets} eat [{n}*{cups}={daily}] cups a day.",
            f"The bags hold [{bag}*{bags}={bag * bags}] cups.",
            f"They last for [{bag * bags}/{daily}={size * bags}] days.",
        ],
        size * bags,
    )


@template
def _split_bill(d: Draw) -> Draft:
    a, who, count, meal = d.person(), d.pick(GROUPS), d.number(3, 8), d.number(10, 30)
    total = count * meal
    tip, drink = count * d.number(2, 4), d.number(2, 6)
    each = (total + tip) // count
    dish = d.pick("pizza dinner lunch brunch supper")
    return (
        f"{a.name} and {a.his} {who}, {count} people in all, have {dish} for ${total}. They add a tip of ${tip} and "
        f"split the sum evenly. {a.name} also buys a drink for ${drink}. How much does {a.he} spend?",
        [
            f"With the tip they pay [${total}+{tip}={total + tip}].",
            f"Each of them pays [${total + tip}/{count}={each}].",
            f"With the drink {a.name} spends [${each}+{drink}={each + drink}].",
        ],
        each + drink,
    )


@template
def _free_places(d: Draw) -> Draft:
    levels, each, k, left = d.number(2, 6), d.number(20, 60, 10), d.number(2, 5, 3), d.number(2, 8)
    total = levels * each
    what, spots = d.pick("garage/spaces hotel/rooms stadium/seats theater/seats").split("/")
    free = total - total // k
    return (
        f"A {what} has {levels} levels with {each} {spots} each. {PARTS[k].capitalize()} of the {spots} are taken in "
        f"the morning, and {left} more at noon. How many {spots} are free then?",
        [
            f"The {what} has [{levels}*{each}={total}] {spots}.",
            f"In the morning [{total}/{k}={total // k}] are taken.",
            f"That leaves [{total}-{total // k}={free}] {spots}.",
            f"At noon [{free}-{left}={free - left}] {spots} are free.",
        ],
        free - left,
    )


@template
def _training_plan(d: Draw) -> Draft:
    a, start, more, day = d.person(), d.number(5, 40), d.number(2, 10), d.pick(DAYS)
    what = d.pick("push-ups sit-ups jumps squats pull-ups")
    two, three = start + more, start + 2 * more
    total = start + two + three
    return (
        f"On {day} {a.name} does {start} {what}. On each of the next two days {a.he} does {more} more than on the day "
        f"before. How many {what} is that in the three days?",
        [
            f"On the second day {a.he} does [{start}+{more}={two}] {what}.",
            f"On the third day {a.he} does [{two}+{more}={three}] {what}.",
            f"In total {a.name} does [{start}+{two}+{three}={total}] {what}.",
        ],
        total,
    )


@template
def _machines(d: Draw) -> Draft:
    n, rate, hours, m = d.number(2, 9), d.number(5, 30), d.number(2, 8), d.number(2, 9)
    what = d.pick("toys chairs bottles shirts shoes books bricks cups")
    each, both = rate * hours, n + m
    return (
        f"A factory has {n} machines that make {rate} {what} an hour each. It buys {m} more of these machines. How "
        f"many {what} can it make in {hours} hours now?",
        [
            f"Now there are [{n}+{m}={both}] machines.",
            f"One machine makes [{rate}*{hours}={each}] {what} in {hours} hours.",
            f"All of them make [{both}*{each}={both * each}] {what}.",
        ],
        both * each,
    )


@template
def _fundraiser(d: Draw) -> Draft:
    (a, b), n, price, k = d.people(2), d.number(5, 30), d.number(2, 8), d.number(2, 4)
    mine, short = n * price, d.number(5, 60)
    both = mine + mine * k
    aim = d.pick("a school trip", "an animal home", "new books", "a playground")
    return (
        f"{a.name} and {b.name} want ${both + short} for {aim}. {a.name} sells {n} raffle tickets at ${price} each, "
        f"and {b.name} takes {TIMES[k]} as much money as {a.name}. How much is still missing?",
        [
            f"{a.name} takes [${n}*{price}={mine}].",
            f"{b.name} takes [${mine}*{k}={mine * k}].",
            f"Together they have [${mine}+{mine * k}={both}].",
            f"They still need [${both + short}-{both}={short}].",
        ],
        short,
    )
