"""A small corpus in Chinese that is made and not fetched: short passages of sentences that say something true.

Sums and products, weekdays and leap years, the animals of years, comparisons, and small scenes in which people buy,
read and go somewhere. The same texts come out every time.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator

from builder.data.documents import Document

_DOCUMENTS = 5000
_DIGITS = "零一二三四五六七八九"
_ANIMALS = "鼠牛虎兔龙蛇马羊猴鸡狗猪"
_WEEKDAYS = "一二三四五六日"
_PEOPLE = ("小明", "小红", "王老师", "李医生", "爷爷", "奶奶", "妈妈", "爸爸", "张先生", "陈小姐", "弟弟", "姐姐")
_PLACES = ("公园", "学校", "图书馆", "火车站", "市场", "医院", "河边", "山上", "博物馆", "邮局", "饭馆", "海边")
_THINGS = {"个": ("苹果", "梨", "橙子", "鸡蛋", "面包"), "本": ("书", "字典", "杂志"), "支": ("铅笔", "毛笔"),
           "只": ("小鸟", "小猫", "兔子", "鸭子"), "张": ("纸", "邮票", "车票"), "条": ("鱼", "毛巾")}  # fmt: skip
_WEATHER = ("天气很好", "下着小雨", "刮着大风", "天上有白云", "雪下得很大", "太阳出来了")
_DOING = ("散步", "看书", "等朋友", "画画", "唱歌", "写信", "下棋", "拍照", "喝茶", "休息")
_TIMES = ("早上", "上午", "中午", "下午", "傍晚", "晚上")
_QUALITIES = (("高", "矮"), ("大", "小"), ("快", "慢"), ("远", "近"), ("新", "旧"), ("轻", "重"))
_NAMES = ("大象", "火车", "飞机", "自行车", "老虎", "房子", "桥", "船", "月亮", "石头")


def read_chinese_sentences() -> Iterator[Document]:
    """Yield the passages, of three to six sentences each."""
    draw = random.Random(20_000)
    for number in range(1, _DOCUMENTS + 1):
        sentences = [draw.choice(_KINDS)(draw) for _ in range(draw.randint(3, 6))]
        yield Document(str(number), "".join(sentences))


def spell(number: int) -> str:
    """Write a number from 0 to 9999 as it is read: 三百零五."""
    if number == 0:
        return "零"
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, unit)
        if digit:
            text += ("零" if gap else "") + _DIGITS[digit] + name
        gap = bool(text) and not digit
    return text[1:] if text.startswith("一十") else text


def _year(year: int) -> str:
    return "".join(_DIGITS[int(digit)] for digit in str(year)) + "年"


def _sum(draw: random.Random) -> str:
    first, second = draw.randint(1, 60), draw.randint(1, 39)
    if draw.random() < 0.5:
        return f"{spell(first)}加{spell(second)}等于{spell(first + second)}。"
    return f"{spell(first + second)}减{spell(second)}等于{spell(first)}。"


def _product(draw: random.Random) -> str:
    first, second = draw.randint(2, 9), draw.randint(2, 9)
    return f"{spell(first)}乘{spell(second)}得{spell(first * second)}。"


def _weekday(draw: random.Random) -> str:
    day = datetime.date(1990, 1, 1) + datetime.timedelta(draw.randrange(16_000))
    return (
        f"{_year(day.year)}{spell(day.month)}月{spell(day.day)}日是星期{_WEEKDAYS[day.weekday()]}，"
        f"第二天是星期{_WEEKDAYS[(day.weekday() + 1) % 7]}。"
    )


def _animal(draw: random.Random) -> str:
    year = draw.randint(1930, 2040)
    animal = _ANIMALS[(year - 1924) % 12]
    return f"{_year(year)}是{animal}年，下一个{animal}年是{_year(year + 12)}。"


def _leap_year(draw: random.Random) -> str:
    year = draw.randint(1900, 2100)
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return f"{_year(year)}{'是' if leap else '不是'}闰年，二月有{'二十九' if leap else '二十八'}天。"


def _compare(draw: random.Random) -> str:
    (more, less), (first, second) = draw.choice(_QUALITIES), draw.sample(_NAMES, 2)
    return f"如果{first}比{second}{more}，那么{second}就比{first}{less}。"


def _buy(draw: random.Random) -> str:
    measure = draw.choice(list(_THINGS))
    thing, person = draw.choice(_THINGS[measure]), draw.choice(_PEOPLE)
    had, more = draw.randint(2, 20), draw.randint(2, 20)
    two = {2: "两"}
    return (
        f"{person}有{two.get(had) or spell(had)}{measure}{thing}，又买了{two.get(more) or spell(more)}{measure}，"
        f"现在一共有{spell(had + more)}{measure}{thing}。"
    )


def _scene(draw: random.Random) -> str:
    person, other = draw.sample(_PEOPLE, 2)
    place, doing, time = draw.choice(_PLACES), draw.choice(_DOING), draw.choice(_TIMES)
    return draw.choice((
        f"{time}，{draw.choice(_WEATHER)}，{person}在{place}{doing}。",
        f"{person}问{other}：“你{time}去{place}吗？”{other}说：“去，我要在那里{doing}。”",
        f"{person}从{place}回来，看见{other}正在{doing}。",
        f"因为{draw.choice(_WEATHER)}，所以{person}没有去{place}，而是在家里{doing}。",
    ))  # fmt: skip


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _sum, _product, _weekday, _animal, _leap_year, _compare, _buy, _scene,
)  # fmt: skip
