/* The log's records packed, in messages, and lines of those said most.
 *
 * `pack` makes what room 2's LogRecord.pack does, and calls that for records
 * that are not all ASCII.  `lines` writes what LogRecord.line or LogRecord.json
 * would for records whose pieces are printable ASCII, and stops at the first
 * one that is any other: Python writes that.  So nothing here escapes,
 * refuses or reports anything.  `bundles` makes what room 9's _bundles does.
 * tests/rooms/test_lines.py compares all with Python.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

/* A record's header: worker, seconds, microseconds, severity, code, length
 * of the pieces; little endian (reference 11.4). */
#define HEAD_BYTES 27
#define WORKER_BYTES 8
/* Seconds from Modified Julian Day 0 to 1970; in seconds of this range a
 * double tells microseconds apart, and a year has four digits. */
#define MJD_SECONDS 3506716800u
#define LAST_SECOND 0xffffffffu
#define STAMP_BYTES 19 /* without the milliseconds */
#define MOST_PIECES 16
/* What a line has besides pieces, format and names; more than enough. */
#define TRIMMINGS 192
#define MOST_CONTENT 65536

typedef struct {
    const char *octets;
    Py_ssize_t length;
} text;

/* How lines look: the arguments that stay the same. */
typedef struct {
    unsigned int code, severity;
    text shown;         /* the code as it is written */
    text format;        /* with {} for each piece */
    text severity_name; /* in JSON */
    PyObject *fields;   /* names of the pieces in JSON, or None: for people */
    bool is_json;
    Py_ssize_t pieces, overhead;
} style;

typedef struct {
    unsigned int code, severity, microseconds;
    uint64_t second; /* since 1970 */
    text worker;
    text pieces[MOST_PIECES];
    Py_ssize_t content, end;
} record;

/* The second that was written last: its date is known. */
typedef struct {
    bool is_known;
    uint64_t second;
    char stamp[STAMP_BYTES + 1];
} calendar;

static uint64_t little_endian(const char *octets, int count)
{
    uint64_t number = 0;
    while (count--)
        number = number << 8 | (unsigned char)octets[count];
    return number;
}

/* Whether an octet stands for itself in the lines of this style. */
static bool is_plain(unsigned char octet, bool is_json)
{
    return octet >= ' ' && octet < 0x7f
           && !(is_json && (octet == '"' || octet == '\\'));
}

/* Whether JSON takes an octet string for the number that Python writes in the
 * same digits; -1 where it would write others. */
static int is_number(text piece)
{
    Py_ssize_t whole = 0, part = 0, n;
    const char *octets = piece.octets;
    while (whole < piece.length && octets[whole] >= '0' && octets[whole] <= '9')
        whole++;
    if (!whole || whole > 15)
        return 0;
    if (whole < piece.length) {
        if (octets[whole] != '.')
            return 0;
        for (n = whole + 1; n < piece.length; n++, part++)
            if (octets[n] < '0' || octets[n] > '9')
                return 0;
        if (!part || part > 9)
            return 0;
    }
    if (whole > 1 && octets[0] == '0')
        return -1;
    if (part) {
        /* Up to 15 digits survive a double; small ones get exponents. */
        if (whole + part > 15 || (part > 1 && octets[piece.length - 1] == '0'))
            return -1;
        if (octets[0] == '0' && part > 4 && !memcmp(octets + 2, "0000", 4))
            return -1;
    }
    return 1;
}

/* Reads the pieces of a record; whether all is plain, and nothing missing. */
static bool read_pieces(record *read, const char *octets, const style *how)
{
    Py_ssize_t count = 0, start = 0, n;
    for (n = 0; n <= read->content; n++) {
        if (n < read->content && octets[n]) {
            if (!is_plain((unsigned char)octets[n], how->is_json))
                return false;
            continue;
        }
        if (count == how->pieces)
            return false;
        read->pieces[count++] = (text){octets + start, n - start};
        start = n + 1;
    }
    return count == how->pieces;
}

/* Reads the record at `place`; whether it is one that is written here. */
static bool read_record(record *read, text packed, Py_ssize_t place,
                        const style *how)
{
    const char *head = packed.octets + place;
    uint64_t seconds;
    Py_ssize_t n;
    if (packed.length - place < HEAD_BYTES)
        return false;
    seconds = little_endian(head + 8, 8);
    read->microseconds = (unsigned int)little_endian(head + 16, 4);
    read->severity = (unsigned char)head[20];
    read->code = (unsigned int)little_endian(head + 21, 2);
    read->content = (Py_ssize_t)little_endian(head + 23, 4);
    if (!read->content || read->code != how->code
            || read->severity != how->severity
            || seconds < MJD_SECONDS || seconds - MJD_SECONDS > LAST_SECOND
            || read->microseconds > 999999
            || read->content > packed.length - place - HEAD_BYTES)
        return false;
    read->second = seconds - MJD_SECONDS;
    read->end = place + HEAD_BYTES + read->content;
    read->worker = (text){head, WORKER_BYTES};
    while (read->worker.length
           && (head[read->worker.length - 1] == ' '
               || !head[read->worker.length - 1]))
        read->worker.length--;
    for (n = 0; n < read->worker.length; n++)
        if (!is_plain((unsigned char)head[n], how->is_json))
            return false;
    return read_pieces(read, head + HEAD_BYTES, how);
}

static char *put(char *out, text piece)
{
    memcpy(out, piece.octets, (size_t)piece.length);
    return out + piece.length;
}

#define PUT(out, literal) put(out, (text){literal, sizeof literal - 1})

/* Writes date and time with milliseconds; NULL if there is no such date. */
static char *put_stamp(char *out, const record *read, calendar *dates,
                       bool is_json)
{
    unsigned int thousandths = read->microseconds / 1000;
    if (!dates->is_known || dates->second != read->second) {
        time_t moment = (time_t)read->second;
        struct tm parts;
        if (!(is_json ? gmtime_r(&moment, &parts)
                      : localtime_r(&moment, &parts))
                || strftime(dates->stamp, sizeof dates->stamp,
                            is_json ? "%Y-%m-%dT%H:%M:%S"
                                    : "%Y-%m-%d %H:%M:%S", &parts)
                   != STAMP_BYTES)
            return NULL;
        dates->is_known = true;
        dates->second = read->second;
    }
    out = put(out, (text){dates->stamp, STAMP_BYTES});
    *out++ = '.';
    *out++ = (char)('0' + thousandths / 100);
    *out++ = (char)('0' + thousandths / 10 % 10);
    *out++ = (char)('0' + thousandths % 10);
    return out;
}

/* Writes the message: its format filled with the pieces. */
static char *put_message(char *out, const record *read, const style *how)
{
    const char *format = how->format.octets;
    const char *end = format + how->format.length;
    const text *piece = read->pieces;
    while (format < end) {
        if (format[0] == '{' && format + 1 < end && format[1] == '}') {
            out = put(out, *piece++);
            format += 2;
        } else
            *out++ = *format++;
    }
    return out;
}

static char *put_line(char *out, const record *read, calendar *dates,
                      const style *how)
{
    Py_ssize_t n;
    if (!(out = put_stamp(out, read, dates, false)))
        return NULL;
    *out++ = ' ';
    out = put(out, how->shown);
    *out++ = ' ';
    out = put(out, read->worker);
    for (n = read->worker.length; n < WORKER_BYTES; n++)
        *out++ = ' ';
    *out++ = ' ';
    out = put_message(out, read, how);
    *out++ = '\n';
    return out;
}

/* Writes an object; NULL if Python would write one of its numbers anew. */
static char *put_json(char *out, const record *read, calendar *dates,
                      const style *how)
{
    Py_ssize_t n;
    out = PUT(out, "{\"time\":\"");
    if (!(out = put_stamp(out, read, dates, true)))
        return NULL;
    out = PUT(out, "Z\",\"worker\":\"");
    out = put(out, read->worker);
    out = PUT(out, "\",\"code\":\"");
    out = put(out, how->shown);
    out = PUT(out, "\",\"severity\":\"");
    out = put(out, how->severity_name);
    out = PUT(out, "\",\"message\":\"");
    out = put_message(out, read, how);
    *out++ = '"';
    for (n = 0; n < how->pieces; n++) {
        PyObject *name = PyTuple_GET_ITEM(how->fields, n);
        int numeric = is_number(read->pieces[n]);
        if (numeric < 0)
            return NULL;
        out = PUT(out, ",\"");
        out = put(out, (text){PyBytes_AS_STRING(name),
                              PyBytes_GET_SIZE(name)});
        out = PUT(out, "\":");
        if (!numeric)
            *out++ = '"';
        out = put(out, read->pieces[n]);
        if (!numeric)
            *out++ = '"';
    }
    return PUT(out, "}\n");
}

/* Completes and checks what the caller says of the lines; -1 with an error. */
static int take_style(style *how)
{
    Py_ssize_t n;
    for (n = 0; n + 1 < how->format.length; n++)
        if (!memcmp(how->format.octets + n, "{}", 2))
            how->pieces++;
    how->overhead = TRIMMINGS + how->shown.length + how->format.length
                    + how->severity_name.length;
    if (how->pieces > MOST_PIECES) {
        PyErr_SetString(PyExc_ValueError, "the format has too many pieces");
        return -1;
    }
    if (how->fields == Py_None)
        return 0;
    how->is_json = true;
    if (!PyTuple_Check(how->fields)
            || PyTuple_GET_SIZE(how->fields) != how->pieces) {
        PyErr_SetString(PyExc_TypeError, "a tuple with a name for each piece");
        return -1;
    }
    for (n = 0; n < how->pieces; n++) {
        PyObject *name = PyTuple_GET_ITEM(how->fields, n);
        if (!PyBytes_Check(name)) {
            PyErr_SetString(PyExc_TypeError, "names are bytes");
            return -1;
        }
        how->overhead += PyBytes_GET_SIZE(name) + 6;
    }
    return 0;
}

/* Makes room for `need` more octets after `used` of them; -1 with an error,
 * and nothing is left of them. */
static int reserve(PyObject **out, Py_ssize_t used, Py_ssize_t need)
{
    if (PyBytes_GET_SIZE(*out) - used >= need)
        return 0;
    if (need <= PY_SSIZE_T_MAX / 4 - used)
        return _PyBytes_Resize(out, 2 * (used + need));
    Py_CLEAR(*out);
    PyErr_NoMemory();
    return -1;
}

PyDoc_STRVAR(lines_doc,
"lines(code, severity, shown, severity_name, format, fields, packed, place)\n"
"--\n\n"
"Lines of the records from `place` on that are plain ones of `code`, their\n"
"number, and the place of the first that is not.  `fields` are the names of\n"
"the pieces in JSON, or None for lines for people.");

static PyObject *lines(PyObject *module, PyObject *arguments)
{
    text packed;
    Py_ssize_t place, count = 0, used = 0;
    style how = {0};
    calendar dates = {0};
    record read;
    PyObject *out;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "IIy#y#y#Oy#n", &how.code, &how.severity,
                          &how.shown.octets, &how.shown.length,
                          &how.severity_name.octets,
                          &how.severity_name.length, &how.format.octets,
                          &how.format.length, &how.fields, &packed.octets,
                          &packed.length, &place)
            || take_style(&how) < 0)
        return NULL;
    if (place < 0 || place > packed.length) {
        PyErr_SetString(PyExc_IndexError, "no such place");
        return NULL;
    }
    if (!(out = PyBytes_FromStringAndSize(
            NULL, how.overhead + 2 * (packed.length - place))))
        return NULL;
    while (read_record(&read, packed, place, &how)) {
        char *start, *end;
        if (reserve(&out, used, 2 * read.content + how.overhead) < 0)
            return NULL;
        start = PyBytes_AS_STRING(out) + used;
        end = (how.is_json ? put_json : put_line)(start, &read, &dates, &how);
        if (!end)
            break;
        used += end - start;
        place = read.end;
        count++;
    }
    if (_PyBytes_Resize(&out, used) < 0)
        return NULL;
    return Py_BuildValue("Nnn", out, count, place);
}

/* ------------------------------------------------------------- packing */

static void put_little_endian(char *out, uint64_t number, int count)
{
    for (; count--; number >>= 8)
        *out++ = (char)(number & 0xff);
}

/* The octets of an ASCII text; whether it is one. */
static bool ascii_of(PyObject *object, text *found)
{
    if (!PyUnicode_Check(object) || !PyUnicode_IS_COMPACT_ASCII(object))
        return false;
    *found = (text){(const char *)PyUnicode_1BYTE_DATA(object),
                    PyUnicode_GET_LENGTH(object)};
    return true;
}

/* Packs the pieces after `used` octets; their length, -1 where Python must
 * pack them, -2 with an error. */
static Py_ssize_t pack_pieces(PyObject **out, Py_ssize_t used, PyObject *pieces)
{
    Py_ssize_t n, length = 0;
    for (n = 0; n < PyTuple_GET_SIZE(pieces); n++) {
        PyObject *shown = PyObject_Str(PyTuple_GET_ITEM(pieces, n));
        text piece;
        char *place;
        if (!shown)
            return -2;
        if (!ascii_of(shown, &piece)
                || piece.length > MOST_CONTENT - length - 1
                || memchr(piece.octets, 0, (size_t)piece.length)) {
            Py_DECREF(shown);
            return -1;
        }
        if (reserve(out, used + length, piece.length + 1) < 0) {
            Py_DECREF(shown);
            return -2;
        }
        place = PyBytes_AS_STRING(*out) + used + length;
        if (n)
            *place++ = 0;
        memcpy(place, piece.octets, (size_t)piece.length);
        length += piece.length + (n > 0);
        Py_DECREF(shown);
    }
    return length;
}

/* Packs a record of five plain words after `used` octets; how many it takes,
 * -1 where Python must pack it, -2 with an error. */
static Py_ssize_t pack_plain(PyObject **out, Py_ssize_t used, PyObject *said)
{
    double moment;
    uint64_t microseconds;
    long severity, code;
    Py_ssize_t length;
    text worker;
    char *head;
    if (!PyTuple_Check(said) || PyTuple_GET_SIZE(said) != 5
            || !ascii_of(PyTuple_GET_ITEM(said, 0), &worker)
            || !PyFloat_CheckExact(PyTuple_GET_ITEM(said, 1))
            || !PyLong_Check(PyTuple_GET_ITEM(said, 2))
            || !PyLong_Check(PyTuple_GET_ITEM(said, 3))
            || !PyTuple_CheckExact(PyTuple_GET_ITEM(said, 4)))
        return -1;
    moment = PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(said, 1));
    severity = PyLong_AsLong(PyTuple_GET_ITEM(said, 2));
    code = PyLong_AsLong(PyTuple_GET_ITEM(said, 3));
    PyErr_Clear();
    if (!(moment >= 0 && moment < LAST_SECOND) || severity < 0
            || severity > 0xff || code < 0 || code > 0xffff)
        return -1;
    if (reserve(out, used, HEAD_BYTES) < 0)
        return -2;
    length = pack_pieces(out, used + HEAD_BYTES, PyTuple_GET_ITEM(said, 4));
    if (length < 0)
        return length;
    head = PyBytes_AS_STRING(*out) + used;
    memset(head, ' ', WORKER_BYTES);
    memcpy(head, worker.octets, (size_t)(
        worker.length < WORKER_BYTES ? worker.length : WORKER_BYTES));
    /* As LogRecord.pack says: a double is up to a quarter of one off. */
    microseconds = (uint64_t)(moment * 1e6 + 0.25);
    put_little_endian(head + 8, microseconds / 1000000 + MJD_SECONDS, 8);
    put_little_endian(head + 16, microseconds % 1000000, 4);
    head[20] = (char)severity;
    put_little_endian(head + 21, (uint64_t)code, 2);
    put_little_endian(head + 23, (uint64_t)length, 4);
    return HEAD_BYTES + length;
}

/* Lets Python pack a record; how many octets it takes, -2 with an error. */
static Py_ssize_t pack_other(PyObject **out, Py_ssize_t used, PyObject *said)
{
    Py_ssize_t length = -2;
    PyObject *packed = PyObject_CallMethod(said, "pack", NULL);
    if (packed && !PyBytes_Check(packed))
        PyErr_SetString(PyExc_TypeError, "a packed record is bytes");
    else if (packed && !reserve(out, used, PyBytes_GET_SIZE(packed))) {
        length = PyBytes_GET_SIZE(packed);
        memcpy(PyBytes_AS_STRING(*out) + used, PyBytes_AS_STRING(packed),
               (size_t)length);
    }
    Py_XDECREF(packed);
    return length;
}

PyDoc_STRVAR(pack_doc,
"pack(records)\n--\n\nA list of records, packed back to back.");

static PyObject *pack(PyObject *module, PyObject *records)
{
    Py_ssize_t n, length, used = 0;
    PyObject *out;
    (void)module;
    if (!PyList_Check(records)) {
        PyErr_SetString(PyExc_TypeError, "records come in a list");
        return NULL;
    }
    if (!(out = PyBytes_FromStringAndSize(
            NULL, 128 * (PyList_GET_SIZE(records) + 1))))
        return NULL;
    /* What is called may do anything, even to the list. */
    for (n = 0; n < PyList_GET_SIZE(records); n++) {
        PyObject *said = PyList_GET_ITEM(records, n);
        Py_INCREF(said);
        length = pack_plain(&out, used, said);
        if (length == -1)
            length = pack_other(&out, used, said);
        Py_DECREF(said);
        if (length < 0) {
            Py_XDECREF(out);
            return NULL;
        }
        used += length;
    }
    /* Shrinking in place would keep all the room. */
    records = PyBytes_FromStringAndSize(PyBytes_AS_STRING(out), used);
    Py_DECREF(out);
    return records;
}

PyDoc_STRVAR(bundles_doc,
"bundles(packed, most)\n--\n\n"
"Packed records in messages of at most `most` octets, or one record that is\n"
"longer: a list of their number and octets.  Raises ValueError for what is\n"
"not whole records.");

/* Appends a message; -1 with an error. */
static int append_message(PyObject *messages, Py_ssize_t count,
                          const char *octets, Py_ssize_t length)
{
    PyObject *message = Py_BuildValue("ny#", count, octets, length);
    int failed = message ? PyList_Append(messages, message) : -1;
    Py_XDECREF(message);
    return failed;
}

static PyObject *bundles(PyObject *module, PyObject *arguments)
{
    text packed;
    Py_ssize_t most, start = 0, end = 0, after, count = 0;
    PyObject *messages;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y#n", &packed.octets, &packed.length,
                          &most)
            || !(messages = PyList_New(0)))
        return NULL;
    for (; end < packed.length; end = after, count++) {
        after = end + HEAD_BYTES;
        if (after <= packed.length)
            after += (Py_ssize_t)little_endian(packed.octets + after - 4, 4);
        if (after > packed.length) {
            PyErr_SetString(PyExc_ValueError, "no whole record");
            goto failed;
        }
        if (count && after - start > most) {
            if (append_message(messages, count, packed.octets + start,
                               end - start) < 0)
                goto failed;
            start = end;
            count = 0;
        }
    }
    if (count && append_message(messages, count, packed.octets + start,
                                end - start) < 0)
        goto failed;
    return messages;
failed:
    Py_DECREF(messages);
    return NULL;
}

/* ---------------------------------------------------------------- module */

static PyMethodDef module_methods[] = {
    {"lines", lines, METH_VARARGS, lines_doc},
    {"pack", pack, METH_O, pack_doc},
    {"bundles", bundles, METH_VARARGS, bundles_doc},
    {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot module_slots[] = {{0, NULL}};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shimmercat_ext.native.lines",
    .m_doc = "Lines of the log from packed records.",
    .m_methods = module_methods,
    .m_slots = module_slots};

PyMODINIT_FUNC PyInit_lines(void)
{
    return PyModuleDef_Init(&module_definition);
}
