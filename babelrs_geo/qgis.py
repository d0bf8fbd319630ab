"""Styles of our layers as text: QML for QGIS, SLD for everybody else.

QGIS reads a GeoPackage's default style from its table `layer_styles`; `vectors.write` puts what is made here
into it, so that a result opens with its classes coloured and its scores labelled. Nothing here needs QGIS,
and the same classes always give the same text.

Colours belong to names, not to runs: a class has the same colour in every file. They are bright, on a dark
casing, so that outlines hold on dark radar and on sunlit roofs, and were chosen to be told apart with normal
sight, protanopia and deuteranopia alike: any two differ by at least 10 in CIE Lab under the simulations of
Machado, Oliveira and Fernandes (2009).
"""

from __future__ import annotations

import colorsys
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STATES = ("detected", "empty", "invalid", "outside", "failed")
"""How a tile can end, in the order of the legend and of the coverage layer's rows."""

_OTHER = "#BDBDBD"
_CASING = "20,20,20,170"

_COLOURS = {
    "ship": "#E69F00",
    "plane": "#56B4E9",
    "aircraft": "#56B4E9",  # the radar datasets' word for a plane: one thing, one colour
    "vehicle": "#F3FC6C",
    "car": "#FC5562",
    "person": "#E1F424",
    "bicycle": "#5BBFC6",
    "other-vehicle": "#748CE4",
    "harbor": "#B47A31",
    "bridge": "#8176F1",
    "storage-tank": "#8AECF3",
    "baseball-diamond": "#85A473",
    "tennis-court": "#C4F4C5",
    "basketball-court": "#2F9490",
    "ground-track-field": "#BFDD7E",
    "soccer-ball-field": "#7FCAAF",
    "swimming-pool": "#80D1F6",
    "roundabout": "#BDCD95",
    "helicopter": "#CB8000",
    "tank": "#897FB3",
    "small-vehicle": "#A8D64D",
    "large-vehicle": "#EE4289",
    "bus": "#B1B656",
    "truck": "#E1FF9E",
    "van": "#A8FCAE",
    "freight-car": "#A1F8E7",
}


_OUTCOMES = {
    "hit": ("hit", "#00A7A0"),
    "missed": ("missed: labelled, not found", "#FFB000"),
    "false": ("false: found, not labelled", "#E8306F"),
    "ignored": ("ignored: its object lies where nobody looked", _OTHER),
}


@dataclass(frozen=True)
class Style:
    """A layer's look, ready for a row of `layer_styles`."""

    name: str
    """Shown in QGIS's list of styles."""
    description: str
    """One line for the same list."""
    qml: str
    """QGIS's own format: everything below."""
    sld: str
    """OGC SLD/SE 1.1: fills, outlines and labels for other programs."""


def class_colour(name: str) -> str:
    """Colour of a class as `#RRGGBB`: from the table, else from a hash of the name (stable across runs and
    machines).

    Case and `_` against `-` make no difference: `Ship` is coloured as `ship`.
    """
    key = name.strip().lower().replace("_", "-")
    if key in _COLOURS:
        return _COLOURS[key]
    digest = hashlib.sha256(key.encode()).digest()
    hue = int.from_bytes(digest[:4], "big") / 2**32
    lightness = 0.45 + 0.25 * digest[4] / 255  # neither lost on dark radar nor on bright concrete
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}"


def detections_style(classes: Iterable[str]) -> Style:
    """Boxes outlined in their class's colour, labelled `class score`; the best score is drawn and labelled
    first.

    Args:
        classes: names that occur in the layer; repeats and order make no difference. Features added later
            under another name are drawn grey.
    """
    names = sorted(set(classes))
    entries = [(name, name, class_colour(name)) for name in names] + [("", "other", _OTHER)]
    return Style(
        "babelrs-geo detections",
        "Boxes coloured by class, labelled with class and score",
        _qml_boxes("class", entries, _LABEL, _MAP_TIP),
        _sld(
            "detections",
            [_sld_class_rule(value, label, colour) for value, label, colour in entries] + [_sld_label_rule()],
        ),
    )


def coverage_style() -> Style:
    """Ground that was looked at in outline only, ground that was not hatched by the reason's kind."""
    return Style(
        "babelrs-geo coverage",
        "How the tiles ended: looked at in outline, not looked at hatched",
        _qml_coverage(),
        _sld("coverage", [_sld_state_rule(state) for state in STATES]),
    )


def matches_style() -> Style:
    """Hits, misses and false finds apart, labelled with class and score: what went wrong stands out."""
    entries = [(value, label, colour) for value, (label, colour) in _OUTCOMES.items()]
    rules = [_sld_class_rule(value, label, colour, "outcome") for value, label, colour in entries]
    return Style(
        "babelrs-geo matches",
        "Hits, misses and false finds, labelled with class and score",
        _qml_boxes("outcome", entries, _MATCH_LABEL, _MATCH_TIP),
        _sld("matches", rules),
    )


# --- QML --------------------------------------------------------------------------------------------------


def _rgba(colour: str, alpha: int = 255) -> str:
    """`#RRGGBB` as QML's `r,g,b,a`."""
    red, green, blue = bytes.fromhex(colour[1:])
    return f"{red},{green},{blue},{alpha}"


def _options(parent: ET.Element, **values: str) -> ET.Element:
    """QML's map of typed options, every one a string."""
    table = ET.SubElement(parent, "Option", type="Map")
    for name, value in values.items():
        ET.SubElement(table, "Option", type="QString", name=name, value=value)
    return table


def _symbol(parent: ET.Element, name: str, kind: str = "fill") -> ET.Element:
    return ET.SubElement(parent, "symbol", alpha="1", clip_to_extent="1", type=kind, name=name, force_rhr="0")


def _layer(symbol: ET.Element, kind: str, **values: str) -> ET.Element:
    layer = ET.SubElement(symbol, "layer", {"class": kind, "enabled": "1", "pass": "0", "locked": "0"})
    _options(layer, **values)
    return layer


def _line(symbol: ET.Element, colour: str, width: float, pattern: str = "") -> None:
    """An outline, widths and dashes in millimetres on the screen: visible at every scale."""
    _layer(
        symbol,
        "SimpleLine",
        line_color=colour,
        line_width=f"{width:g}",
        line_width_unit="MM",
        line_style="solid",
        joinstyle="miter",
        capstyle="flat" if pattern else "square",
        use_custom_dash="1" if pattern else "0",
        customdash=pattern or "5;2",
        customdash_unit="MM",
    )


def _fill(symbol: ET.Element, colour: str) -> None:
    _layer(symbol, "SimpleFill", color=colour, style="solid", outline_style="no")


def _hatch(symbol: ET.Element, colour: str, angle: int, distance: float) -> None:
    """Parallel lines, `angle` degrees counter-clockwise from east, `distance` millimetres apart."""
    index = sum(1 for _ in symbol.iter("layer"))
    pattern = _layer(
        symbol,
        "LinePatternFill",
        angle=f"{angle}",
        distance=f"{distance:g}",
        distance_unit="MM",
        color=colour,
        line_width="0.3",
        line_width_unit="MM",
    )
    _line(_symbol(pattern, f"@{symbol.get('name')}@{index}", "line"), colour, 0.3)


def _categories(root: ET.Element, attribute: str, entries: Sequence[tuple[str, str]]) -> ET.Element:
    """A renderer by the values of a column; entries are (value, label), an empty value catches all others."""
    renderer = ET.SubElement(
        root,
        "renderer-v2",
        type="categorizedSymbol",
        attr=attribute,
        forceraster="0",
        symbollevels="0",
        referencescale="-1",
        enableorderby="0",
    )
    listed = ET.SubElement(renderer, "categories")
    for index, (value, label) in enumerate(entries):
        ET.SubElement(
            listed, "category", type="string", value=value, label=label, symbol=str(index), render="true"
        )
    return renderer


def _document(labels: bool) -> ET.Element:
    # Only what a style of ours decides; a user's fields, forms and actions stay untouched.
    return ET.Element(
        "qgis",
        version="3.22.0",
        styleCategories="Symbology|Labeling|MapTips|Rendering",
        labelsEnabled="1" if labels else "0",
        simplifyDrawingHints="1",
        hasScaleBasedVisibilityFlag="0",
    )


def _text(root: ET.Element, doctype: str = "") -> str:
    ET.indent(root, " ")
    return f"{doctype}{ET.tostring(root, encoding='unicode')}\n"


_DOCTYPE = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"

_LABEL = '"class" || \' \' || format_number("score", 2)'
_MATCH_LABEL = "\"class\" || coalesce(' ' || format_number(\"score\", 2), '')"

_MATCH_TIP = (
    '<b>[% "outcome" %]</b> [% "class" %]'
    "[% coalesce('<br>score ' || format_number(\"score\", 2), '') %]"
    "[% coalesce('<br>IoU ' || format_number(\"iou\", 2), '') %]"
    "[% coalesce('<br>labelled ' || \"labelled\", '') %]"
)

_MAP_TIP = (
    '<b>[% "class" %]</b> [% format_number("score", 2) %]<br>'
    "[% coalesce(format_number(\"length_m\", 1) || ' × ' || format_number(\"width_m\", 1) || ' m', '') %]"
    "[% coalesce('<br>heading ' || format_number(\"heading_deg\", 0) || '°', '') %]"
)


def _qml_boxes(column: str, entries: Sequence[tuple[str, str, str]], label: str, tip: str) -> str:
    """Boxes by the values of a column, (value, label, colour) each; the best score is drawn and labelled first."""
    root = _document(labels=True)
    renderer = _categories(root, column, [(value, label) for value, label, _ in entries])
    renderer.set("enableorderby", "1")
    symbols = ET.SubElement(renderer, "symbols")
    for index, (_, _, colour) in enumerate(entries):
        symbol = _symbol(symbols, str(index))
        _fill(symbol, _rgba(colour, 30))
        _line(symbol, _CASING, 0.9)
        _line(symbol, _rgba(colour), 0.46)
    order = ET.SubElement(ET.SubElement(renderer, "orderby"), "orderByClause", asc="1", nullsFirst="1")
    order.text = '"score"'
    _labeling(root, label)
    ET.SubElement(root, "previewExpression").text = label
    ET.SubElement(root, "mapTip").text = tip
    ET.SubElement(root, "layerGeometryType").text = "2"
    return _text(root, _DOCTYPE)


def _labeling(root: ET.Element, label: str) -> None:
    """White text on a dark halo beside the box; where labels collide the better score wins."""
    labeling = ET.SubElement(root, "labeling", type="simple")
    settings = ET.SubElement(labeling, "settings", calloutType="simple")
    style = ET.SubElement(
        settings,
        "text-style",
        fieldName=label,
        isExpression="1",
        fontSize="8",
        fontSizeUnit="Point",
        fontWeight="63",
        textColor="255,255,255,255",
        textOpacity="1",
    )
    ET.SubElement(
        style,
        "text-buffer",
        bufferDraw="1",
        bufferSize="0.7",
        bufferSizeUnits="MM",
        bufferColor="20,20,20,255",
        bufferOpacity="0.75",
        bufferNoFill="0",
        bufferJoinStyle="128",
    )
    # 8: outside the polygon, so that the label never hides the object it names.
    ET.SubElement(settings, "placement", placement="8", dist="1", distUnits="MM", polygonPlacementFlags="2")
    ET.SubElement(settings, "rendering", drawLabels="1", obstacle="1", obstacleFactor="0.5", obstacleType="1")
    collection = ET.SubElement(ET.SubElement(settings, "dd_properties"), "Option", type="Map")
    ET.SubElement(collection, "Option", type="QString", name="name", value="")
    listed = ET.SubElement(collection, "Option", type="Map", name="properties")
    priority = ET.SubElement(listed, "Option", type="Map", name="Priority")
    ET.SubElement(priority, "Option", type="bool", name="active", value="true")
    ET.SubElement(priority, "Option", type="QString", name="expression", value='"score" * 10')
    ET.SubElement(priority, "Option", type="int", name="type", value="3")
    ET.SubElement(collection, "Option", type="QString", name="type", value="collection")


@dataclass(frozen=True)
class _Ground:
    """How one state of the coverage layer is drawn."""

    label: str
    colour: str
    dash: str = ""
    hatches: tuple[int, ...] = ()


_GROUND = {
    "detected": _Ground("looked at, objects found", "#00A7A0"),
    "empty": _Ground("looked at, nothing found", "#8FA3AD", dash="3;1.5"),
    "invalid": _Ground("no valid pixels", "#BDBDBD", hatches=(45,)),
    "outside": _Ground("outside the area asked for", "#B0A8C8", dash="1;1", hatches=(135,)),
    "failed": _Ground("failed", "#F4511E", hatches=(45, 135)),
}


def _qml_coverage() -> str:
    root = _document(labels=False)
    renderer = _categories(root, "state", [(state, _GROUND[state].label) for state in STATES])
    symbols = ET.SubElement(renderer, "symbols")
    for index, state in enumerate(STATES):
        ground = _GROUND[state]
        symbol = _symbol(symbols, str(index))
        for angle in ground.hatches:
            _hatch(symbol, _rgba(ground.colour, 230), angle, 3.5)
        _line(symbol, _rgba(ground.colour), 0.4, ground.dash)
    ET.SubElement(root, "mapTip").text = (
        '<b>[% "state" %]</b> [% "reason" %]<br>[% "tiles" %] tiles'
        "[% coalesce(', ' || format_number(\"area_km2\", 2) || ' km²', '') %]"
    )
    ET.SubElement(root, "layerGeometryType").text = "2"
    return _text(root, _DOCTYPE)


# --- SLD --------------------------------------------------------------------------------------------------

_SE = "http://www.opengis.net/se"
_OGC = "http://www.opengis.net/ogc"
_SLD = "http://www.opengis.net/sld"
_SLD_ATTRIBUTES = {"xmlns": _SLD, "xmlns:se": _SE, "xmlns:ogc": _OGC, "version": "1.1.0"}
_PIXELS = 1 / 0.28  # SE draws in pixels of 0.28 mm


def _parameters(parent: ET.Element, tag: str, **values: str) -> None:
    block = ET.SubElement(parent, tag)
    for name, value in values.items():
        ET.SubElement(block, "se:SvgParameter", name=name.replace("_", "-")).text = value


def _stroke(rule: ET.Element, colour: str, width: float, opacity: float = 1.0, dash: str = "") -> None:
    extra = {}
    if dash:
        extra["stroke_dasharray"] = " ".join(f"{float(part) * _PIXELS:.3g}" for part in dash.split(";"))
    line = ET.SubElement(rule, "se:LineSymbolizer")
    width_px = f"{width * _PIXELS:.3g}"
    opacity_text = f"{opacity:.2g}"
    _parameters(line, "se:Stroke", stroke=colour, stroke_width=width_px, stroke_opacity=opacity_text, **extra)


def _rule(name: str) -> ET.Element:
    rule = ET.Element("se:Rule")
    ET.SubElement(rule, "se:Name").text = name
    return rule


def _equals(parent: ET.Element, column: str, value: str) -> None:
    test = ET.SubElement(parent, "ogc:PropertyIsEqualTo")
    ET.SubElement(test, "ogc:PropertyName").text = column
    ET.SubElement(test, "ogc:Literal").text = value


def _sld_class_rule(value: str, label: str, colour: str, column: str = "class") -> ET.Element:
    """One class; an empty value stands for those without a rule of their own."""
    rule = _rule(label)
    if value:
        _equals(ET.SubElement(rule, "ogc:Filter"), column, value)
    else:
        ET.SubElement(rule, "se:ElseFilter")
    polygon = ET.SubElement(rule, "se:PolygonSymbolizer")
    _parameters(polygon, "se:Fill", fill=colour, fill_opacity="0.12")
    _stroke(rule, "#141414", 0.9, 0.67)
    _stroke(rule, colour, 0.46)
    return rule


def _sld_label_rule() -> ET.Element:
    rule = _rule("label")
    text = ET.SubElement(rule, "se:TextSymbolizer")
    label = ET.SubElement(text, "se:Label")
    ET.SubElement(label, "ogc:PropertyName").text = "class"
    ET.SubElement(label, "ogc:Literal").text = " "
    score = ET.SubElement(label, "ogc:Function", name="numberFormat")
    ET.SubElement(score, "ogc:Literal").text = "0.00"
    ET.SubElement(score, "ogc:PropertyName").text = "score"
    _parameters(text, "se:Font", font_size="11", font_weight="bold")
    halo = ET.SubElement(text, "se:Halo")
    ET.SubElement(halo, "se:Radius").text = "2"
    _parameters(halo, "se:Fill", fill="#141414", fill_opacity="0.75")
    _parameters(text, "se:Fill", fill="#FFFFFF")
    return rule


def _sld_state_rule(state: str) -> ET.Element:
    ground = _GROUND[state]
    rule = _rule(state)
    description = ET.SubElement(rule, "se:Description")
    ET.SubElement(description, "se:Title").text = ground.label
    _equals(ET.SubElement(rule, "ogc:Filter"), "state", state)
    for angle in ground.hatches:
        polygon = ET.SubElement(rule, "se:PolygonSymbolizer")
        graphic = ET.SubElement(
            ET.SubElement(ET.SubElement(polygon, "se:Fill"), "se:GraphicFill"), "se:Graphic"
        )
        mark = ET.SubElement(graphic, "se:Mark")
        ET.SubElement(mark, "se:WellKnownName").text = "shape://slash" if angle < 90 else "shape://backslash"
        _parameters(mark, "se:Stroke", stroke=ground.colour, stroke_width="0.7")
        ET.SubElement(graphic, "se:Size").text = "11"
    _stroke(rule, ground.colour, 0.4, dash=ground.dash)
    return rule


def _sld(layer: str, rules: Sequence[ET.Element]) -> str:
    root = ET.Element("StyledLayerDescriptor", _SLD_ATTRIBUTES)
    named = ET.SubElement(root, "NamedLayer")
    ET.SubElement(named, "se:Name").text = layer
    user = ET.SubElement(named, "UserStyle")
    ET.SubElement(user, "se:Name").text = f"babelrs-geo {layer}"
    kind = ET.SubElement(user, "se:FeatureTypeStyle")
    kind.extend(rules)
    return _text(root, '<?xml version="1.0" encoding="UTF-8"?>\n')
