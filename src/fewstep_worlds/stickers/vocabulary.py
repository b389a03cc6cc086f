"""Concepts, styles, colours and patterns of sticker scenes, and their words in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("noto", "twemoji", "fluent", "emojione")
HELD_OUT_STYLE = "emojione"

COLOURS = {
    "white": (255, 255, 255),
    "grey": (196, 198, 204),
    "red": (238, 120, 112),
    "orange": (250, 190, 120),
    "yellow": (250, 234, 130),
    "green": (158, 218, 142),
    "teal": (120, 208, 204),
    "blue": (136, 186, 250),
    "purple": (198, 166, 240),
    "pink": (250, 190, 214),
}
"""RGB of a background's first tone."""

PATTERNS = ("plain", "stripes", "dots", "checks", "stars", "gradient")


@dataclass(frozen=True)
class Concept:
    """A kind of sticker.

    Attributes:
        name: its first English word.
        code: Unicode code point of the emoji, in hexadecimal.
        words: further English words.
        chinese: Chinese words, the usual one first.
        measure: Chinese measure word.
    """

    name: str
    code: str
    words: tuple[str, ...]
    chinese: tuple[str, ...]
    measure: str


def _concept(name: str, code: str, words: str, chinese: str, measure: str) -> Concept:
    return Concept(name, code, tuple(words.split(", ")), tuple(chinese.split("、")), measure)


CONCEPTS = {
    concept.name: concept
    for concept in (
        _concept("apple", "1f34e", "red apple, ripe apple, orchard apple", "苹果、红苹果", "个"),
        _concept("banana", "1f34c", "plantain, yellow banana, peeled banana", "香蕉", "根"),
        _concept("strawberry", "1f353", "red berry, berry, garden strawberry", "草莓", "颗"),
        _concept("watermelon", "1f349", "melon, slice of watermelon, melon slice", "西瓜", "块"),
        _concept("lemon", "1f34b", "citrus fruit, sour lemon, yellow lemon", "柠檬", "个"),
        _concept("pineapple", "1f34d", "ananas, tropical fruit, spiky fruit", "菠萝、凤梨", "个"),
        _concept("carrot", "1f955", "root vegetable, orange carrot, garden carrot", "胡萝卜、红萝卜", "根"),
        _concept("mushroom", "1f344", "toadstool, fungus, red mushroom", "蘑菇、毒蘑菇", "朵"),
        _concept("pizza", "1f355", "slice of pizza, pizza slice, piece of pizza", "披萨、比萨", "块"),
        _concept("hamburger", "1f354", "burger, cheeseburger, beefburger", "汉堡、汉堡包", "个"),
        _concept("doughnut", "1f369", "donut, glazed donut, frosted doughnut", "甜甜圈", "个"),
        _concept("birthday cake", "1f382", "cake, layer cake, party cake", "生日蛋糕、蛋糕", "个"),
        _concept("ice cream", "1f366", "ice cream cone, gelato, soft ice", "冰淇淋、冰激凌、甜筒", "个"),
        _concept("lollipop", "1f36d", "lolly, candy, sucker", "棒棒糖", "根"),
        _concept("cactus", "1f335", "succulent, desert plant, saguaro", "仙人掌", "棵"),
        _concept("tree", "1f333", "leafy tree, oak, shade tree", "树、大树", "棵"),
        _concept("tulip", "1f337", "spring flower, tulip flower, pink flower", "郁金香", "朵"),
        _concept("sunflower", "1f33b", "yellow flower, summer flower, sunflower head", "向日葵、葵花", "朵"),
        _concept("sun", "2600", "shining sun, sunburst, bright sun", "太阳、日头", "个"),
        _concept("moon", "1f319", "crescent moon, crescent, half moon", "月亮、弯月", "个"),
        _concept("star", "2b50", "gold star, yellow star, five-pointed star", "星星、五角星", "颗"),
        _concept("heart", "2764", "red heart, love heart, valentine", "红心、爱心", "颗"),
        _concept("rocket", "1f680", "spaceship, rocket ship, spacecraft", "火箭、宇宙飞船", "枚"),
        _concept("car", "1f697", "automobile, auto, motorcar, sedan", "汽车、轿车、小车", "辆"),
        _concept("bus", "1f68c", "coach, omnibus, shuttle bus", "公交车、巴士、公共汽车", "辆"),
        _concept("bicycle", "1f6b2", "bike, pushbike, two-wheeler", "自行车、单车、脚踏车", "辆"),
        _concept("sailboat", "26f5", "sailing boat, boat, yacht", "帆船、小船", "艘"),
        _concept("airplane", "2708", "plane, aeroplane, jet", "飞机、客机", "架"),
        _concept("house", "1f3e0", "home, cottage, little house", "房子、小屋、房屋", "座"),
        _concept("umbrella", "2614", "brolly, parasol, rain umbrella", "雨伞、伞", "把"),
        _concept("key", "1f511", "door key, latchkey, old key", "钥匙", "把"),
        _concept("bell", "1f514", "handbell, chime, ringing bell", "铃铛、铃", "个"),
        _concept("guitar", "1f3b8", "electric guitar, six-string, rock guitar", "吉他、电吉他", "把"),
        _concept("balloon", "1f388", "party balloon, air balloon, toy balloon", "气球", "个"),
        _concept("gift", "1f381", "present, wrapped gift, gift box", "礼物、礼盒", "份"),
        _concept("crown", "1f451", "royal crown, coronet, tiara", "皇冠、王冠", "顶"),
        _concept("gem stone", "1f48e", "gem, diamond, jewel", "宝石、钻石", "颗"),
        _concept("top hat", "1f3a9", "hat, stovepipe hat, tall hat", "礼帽、高帽、帽子", "顶"),
        _concept("book", "1f4d5", "closed book, textbook, novel", "书、书本", "本"),
        _concept("hourglass", "231b", "sandglass, sand timer, egg timer", "沙漏", "个"),
        _concept("light bulb", "1f4a1", "bulb, lamp, electric bulb", "灯泡、电灯泡", "个"),
        _concept("cup of coffee", "2615", "mug, coffee cup, hot drink", "咖啡、热饮", "杯"),
        _concept("anchor", "2693", "ship anchor, iron anchor, boat anchor", "锚、船锚", "个"),
        _concept("soccer ball", "26bd", "football, ball, leather ball", "足球", "个"),
        _concept("camera", "1f4f7", "photo camera, digital camera, snapshot camera", "相机、照相机", "台"),
        _concept("alarm clock", "23f0", "clock, timepiece, bedside clock", "闹钟、时钟", "个"),
        _concept("robot", "1f916", "android, droid, bot", "机器人", "个"),
        _concept("ghost", "1f47b", "spook, phantom, spectre", "幽灵、鬼", "个"),
        _concept("jack-o-lantern", "1f383", "pumpkin, carved pumpkin, halloween pumpkin", "南瓜灯、南瓜", "个"),
        _concept("snowman", "26c4", "snowy man, frosty snowman, winter snowman", "雪人", "个"),
        _concept("cat", "1f431", "cat face, kitty, kitten, pussycat", "猫、猫咪、小猫", "只"),
        _concept("dog", "1f436", "dog face, doggy, puppy, pooch", "狗、小狗、狗狗", "只"),
        _concept("pig", "1f437", "pig face, piggy, hog", "猪、小猪", "头"),
        _concept("panda", "1f43c", "panda bear, bamboo bear, panda face", "熊猫、大熊猫", "只"),
        _concept("frog", "1f438", "froggy, toad, green frog", "青蛙、蛙", "只"),
        _concept("penguin", "1f427", "antarctic bird, emperor penguin, little penguin", "企鹅", "只"),
        _concept("octopus", "1f419", "kraken, cephalopod, devilfish", "章鱼、八爪鱼", "只"),
        _concept("fish", "1f41f", "little fish, blue fish, swimming fish", "鱼、小鱼", "条"),
        _concept("butterfly", "1f98b", "winged insect, pretty butterfly, garden butterfly", "蝴蝶", "只"),
        _concept("ladybug", "1f41e", "ladybird, lady beetle, spotted beetle", "瓢虫", "只"),
        _concept("turtle", "1f422", "tortoise, sea turtle, terrapin", "乌龟、海龟", "只"),
        _concept("crab", "1f980", "red crab, crustacean, beach crab", "螃蟹、蟹", "只"),
        _concept("snail", "1f40c", "escargot, garden snail, slow snail", "蜗牛", "只"),
        _concept("elephant", "1f418", "jumbo, pachyderm, little elephant", "大象、象", "头"),
    )
}

NAMES = tuple(CONCEPTS)
