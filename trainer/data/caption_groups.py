"""Kinds of tags: what a character's features are, and what a caption should keep.

The kinds are those of the guides. Features (hair, eyes, body) may be pruned so that the trigger word
learns them, clothes may be kept or pruned, and everything that varies from picture to picture stays
(people, action, view, expression, background, framing). ``*`` stands for any characters.
"""

from __future__ import annotations


def _lines(text: str) -> tuple[str, ...]:
    return tuple(part for line in text.splitlines() for item in line.split(",") if (part := item.strip()))


# Every group: names and patterns. A tag that also belongs to a protected group counts as protected.
GROUPS: dict[str, tuple[str, ...]] = {
    "hair": _lines("""
        * hair, *bangs, ahoge, * ahoge, *braid, *braids, *ponytail, *twintails, twin tails, bald, afro
        *hair bun, *hair buns, double bun, bob cut, hime cut, pixie cut, bowl cut, buzz cut, undercut
        *sidelocks, *hair intakes, hair flaps, hair between eyes, hair over *, hair behind ear, hair tubes
        * drills, *dreadlocks, *mohawk, two side up, one side up, half updo, widow's peak, ringlets
        cornrows, topknot, pompadour, hair slicked back
    """),
    "eyes": _lines("""
        * eyes, heterochromia, *pupils, * sclera, *eyelashes, *eyebrows, *eyelids, *irises, bags under eyes
    """),
    "body": _lines("""
        breasts, * breasts, flat chest, mole, * mole, mole *, freckles, * skin, skin fang, fang, fangs, elf
        dark elf, ears, * ears, tail, * tail, tails, * tails, horn, horns, * horn, * horns, wings, * wing
        * wings, halo, facial mark, * facial mark, whisker markings, *tattoo, scar, scars, * scar, scar *
        birthmark, abs, muscular *, toned, wide hips, thick thighs, curvy, plump, petite, skinny, beard
        * beard, mustache, facial hair, stubble, goatee, sideburns, claws, scales, fur, * fur, antennae
        *dark-skinned *
    """),
    "clothes": _lines("""
        *uniform, serafuku, *skirt, *swimsuit, *bikini, hat, * hat, *pantyhose, *clothes, clothes *, *shirt
        dress, * dress, sundress, nightgown, * nightgown, *pants, *shorts, *jacket, *coat, *hoodie, *sweater
        *cardigan, vest, * vest, *kimono, *yukata, *apron, *socks, *kneehighs, *thighhighs, *stockings
        *leggings, *shoes, *boots, *sneakers, *loafers, *sandals, *slippers, *heels, *footwear, *gloves
        *sleeves, sleeveless, *collar, *choker, *necklace, *earrings, *earring, *bracelet, ring, * ring
        *jewelry, *ribbon, bow, * bow, *bowtie, *necktie, *scarf, *belt, cape, * cape, *cloak, *capelet
        *armor, *glasses, *eyewear, mask, * mask, *hairband, *hairclip, *hairpin, *hair ornament, *headband
        *headwear, *headdress, hood, * hood, *crown, *tiara, *helmet, *underwear, *panties, bra, * bra
        *lingerie, *leotard, *bodysuit, robe, * robe, bathrobe, suit, * suit, *costume, *backpack, bag
        * bag, handbag, *corset, garter straps, zettai ryouiki, *wristband, *armband, arm warmers
        leg warmers, * pocket, *buttons, *zipper, *frills, frilled *, lace, * lace, lace-trimmed *, beret
        cap, * cap, sash, * sash, obi, sarong, *tank top, *crop top, off-shoulder *, bare shoulders
        barefoot, *headphones, *goggles, *eyepatch, plaid *, striped *, * print, polka dot *
    """),
    "people": _lines("""
        1girl, 1boy, 1other, *girls, *boys, *others, solo, solo focus, multiple *, no humans, male focus
        female focus, couple, group, crowd, everyone, duo, trio, siblings, sisters, brothers, twins
        animal focus
    """),
    "action": _lines("""
        standing, standing *, sitting, sitting *, lying, on back, on side, on stomach, kneeling, squatting
        seiza, wariza, walking, running, jumping, flying, falling, floating, swimming, climbing, dancing
        singing, fighting, eating, drinking, cooking, reading, writing, drawing, sleeping, bathing, riding *
        holding, holding *, carrying *, hugging *, hug, * hug, kissing, kiss, * kiss, pointing, pointing *
        waving, stretching, crossed arms, crossed legs, crossed ankles, spread *, arm up, arms up
        arm at side, arms at sides, arm behind *, arms behind *, arm around *, arms around *, arm support
        own hands *, hand up, hands up, hand to *, hand in *, hands in *, *hand on *, *hands on *
        hand over *, hands over *, leg up, legs up, leg lift, legs apart, legs together, knee up, knees up
        knees to chest, knees together *, leaning *, bent over, head tilt, head rest, chin rest
        outstretched *, reaching *, adjusting *, tying *, untying *, playing *, covering *, * grab
        grabbing *, * pull, pulling *, * lift, lifting *, peace sign, v, double v, salute, thumbs up
        clenched hand, clenched hands, dual wielding, fighting stance, action, motion blur, twisted torso
        top-down bottom-up, all fours, contrapposto, indian style, yokozuwari, straddling, undressing
        dressing, removing *, opening *, fetal position, handstand, princess carry, wet hair, floating hair
        hair spread out, wind, pose, * pose, against *
    """),
    "view": _lines("""
        looking *, facing *, from above, from below, from behind, from side, from outside, pov, * pov
        profile, dutch angle, straight-on, back, eye contact, foreshortening, perspective, fisheye
        upside-down, sideways glance, * view, turned away, back-to-back, depth of field, blurry *
    """),
    "expression": _lines("""
        smile, smile *, * smile, smiling, grin, * grin, smirk, smug, blush, *blush, open mouth, closed mouth
        parted lips, * mouth, closed eyes, half-closed eyes, one eye closed, wink, wide-eyed, empty eyes
        narrowed eyes, rolling eyes, crossed eyes, glaring, tears, crying, crying *, streaming tears, teeth
        * teeth, tongue, tongue out, licking *, drooling, saliva, angry, annoyed, sad, surprised, happy
        scared, embarrassed, worried, nervous, nervous *, serious, expressionless, bored, sleepy, tired
        confused, confident, shy, determined, disgust, pain, * expression, laughing, frown, frowning, pout
        scowl, raised eyebrow, raised eyebrows, furrowed brow, v-shaped eyebrows, tsurime, tareme, jitome
        sweat, sweatdrop, anger vein, flustered, naughty face, ahegao, :d, :o, :q, :3, :p, :t, :<, :|, :/
        ;d, ;), ;o, ;p, d:, xd, >:), >:(, >_<, >_o, @_@, ^_^, =_=, o_o, 0_0, u_u, x_x, +_+, ._., +_-
    """),
    "background": _lines("""
        indoors, outdoors, *background, night, * night, day, * day, sunset, sunrise, dawn, dusk, evening
        sky, * sky, cloud, clouds, * clouds, sun, moon, * moon, star (sky), snow, snowing, rain, fog, mist
        storm, tree, trees, * tree, forest, grass, field, * field, flower field, garden, park, mountain
        * mountain, hill, river, lake, ocean, sea, beach, * beach, sand, shore, island, pool, waterfall
        water, underwater, city, cityscape, * city, town, village, street, road, alley, bridge, building
        * building, house, castle, shrine, temple, church, school, classroom, office, library, kitchen
        bedroom, bathroom, room, * room, hallway, stairs, window, * window, door, wall, * wall, floor
        * floor, ceiling, curtains, bed, * bed, couch, chair, * chair, table, desk, bench, bookshelf, lamp
        train interior, car interior, cafe, restaurant, shop, market, stage, stadium, rooftop, balcony
        fence, railing, pillar, scenery, nature, landscape, horizon, sunlight, moonlight, starry sky
        autumn leaves, cherry blossoms, bamboo, ruins, cave, desert, space, planet, petals, falling petals
        light particles, lantern, on bed, on chair, on floor, on couch, bed sheet, pillow, fireworks
        festival, bamboo forest, power lines, utility pole, lamppost
    """),
    "framing": _lines("""
        full body, upper body, lower body, cowboy shot, portrait, close-up, face, wide shot, very wide shot
        * focus, out of frame, * out of frame, cropped *, multiple views, split screen, border, * border
        letterboxed, head only, bust, torso, reference sheet, turnaround, collage, comic, 4koma
    """),
    "medium": _lines("""
        photo, photo (medium), photorealistic, realistic, sketch, monochrome, greyscale, sepia, spot color
        lineart, traditional media, * (medium), watercolor, oil painting, pixel art, 3d, chibi, official art
        cosplay photo, game cg, anime coloring, flat color, cel shading, concept art, partially colored
        high contrast, chromatic aberration, film grain, bokeh, lens flare
    """),
    "text": _lines("""
        watermark, * watermark, signature, * signature, text, * text, artist name, twitter username
        * username, web address, logo, * logo, dated, copyright notice, speech bubble, blank speech bubble
        thought bubble, character name, copyright name, subtitled, jpeg artifacts, qr code, barcode
    """),
}

# Names for several groups at once.
UNIONS: dict[str, tuple[str, ...]] = {
    "features": ("hair", "eyes", "body"),
    "kept": ("people", "action", "view", "expression", "background", "framing"),
}
# What a wildcard or a group never deletes: only a tag's full name does.
PROTECTED = (*UNIONS["kept"], "medium", "text")
