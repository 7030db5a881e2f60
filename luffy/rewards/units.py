"""Words behind a value: units that may be dropped, and words that say more than a unit does."""

_UNITS = """
    mm cm dm km kilometer kilometre meter metre centimeter centimetre millimeter millimetre inch inches foot
    feet ft in yard mile mph light-year light-years unit square cubic sq cu acre hectare liter litre milliliter
    millilitre ml gallon quart pint cup ounce oz pound lb lbs ton tonne gram kilogram kg mg second sec minute
    min hour hr day week month year decade century centuries degree deg radian rad kelvin celsius fahrenheit
    joule kj ev kev mev erg calorie kcal watt kw kilowatt newton pascal kpa atm bar volt ohm ampere amp coulomb
    farad henry tesla gauss hertz hz khz mhz ghz mole mol molar dollar cent euro rupee yen pence penny pennies
    people person student child children boy girl men women way apple orange ball marble card coin book page
    stamp ticket game point vote time step piece pair digit number solution root face edge side vertex
    vertices percent parsec pc kpc mpc angstrom nm au dyne rev revolution revolutions rpm bit byte
"""
_SHORT_UNITS = """
    hz pa ev nm um pm fm hl dl cl kw kv ma mv mw gw pf nf ms ns us ly mi sr lx lm wb kj gj mj kn mn
"""
_SAYS = """
    or and not nor does do is are than least most to times if else except no but only each more less over plus minus
    divided root pi squared cubed inverse factorial negative mod modulo base score gross below above zero infinity
    choose double triple twice hex binary octal decimal tens ones
    hundred thousand million billion trillion quadrillion quintillion dozen lakh crore mil bn mn
    hundreds thousands millions billions trillions quadrillions quintillions dozens lakhs crores
    halves third thirds fourth fourths fifth fifths sixth sixths eighth eighths ninth ninths tenth tenths
    hundredth hundredths thousandth thousandths millionth millionths
"""
UNITS = frozenset(_UNITS.split())
SHORT_UNITS = frozenset(_SHORT_UNITS.split())
"""Of two letters; other words of one or two are products."""
LETTER_UNITS = frozenset("mgsKJWNVACFHTLh")
SAYS = frozenset(_SAYS.split())
DAYTIME = frozenset(("am", "pm"))
