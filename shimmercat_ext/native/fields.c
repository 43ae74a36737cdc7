/* Fields on their way between clients and applications.
 *
 * `request` makes what room 4's _read_head does, `passed` what room 4c's
 * _passed does, and `answer` what room 11b's _read_answer does.  Each gives
 * None for all that is unusual: Python looks at that, and refuses it maybe.
 * So nothing here reports anything but want of memory.
 * tests/rooms/test_fields.py compares all with Python.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <string.h>

/* Octets of the longest method, target and name, and the most fields. */
#define METHOD_BYTES 64
#define TARGET_BYTES 8192
#define NAME_BYTES 256
#define MOST_FIELDS 256

PyDoc_STRVAR(request_doc,
"request(fields) -> (method, scheme, target, authority, protocol, others)\n\n"
"What the pseudo-fields of a request say, and the list of its other fields.\n"
"None where the head is no usual one.");

PyDoc_STRVAR(passed_doc,
"passed(fields, trusted) -> list\n\n"
"The fields of a request that are for an application as they are.  None where\n"
"a name is none, or fields of this connection are named.");

PyDoc_STRVAR(answer_doc,
"answer(lines, status) -> (fields, upgrade, coding, length, is_odd)\n\n"
"The fields of an answer that are for a client; the values of Upgrade,\n"
"Transfer-Encoding and Content-Length; whether HTTP forbids one of the fields.\n"
"None where there are very many, or options of the connection.");

typedef struct {
    const char *octets;
    Py_ssize_t length;
} text;

/* Octets of names in lower case, with those of methods beside them. */
static bool is_name_octet(unsigned char octet)
{
    return (octet >= 'a' && octet <= 'z') || (octet >= '0' && octet <= '9')
           || (octet && strchr("!#$%&'*+-.^_`|~", octet));
}

static bool is_method_octet(unsigned char octet)
{
    return is_name_octet(octet) || (octet >= 'A' && octet <= 'Z');
}

/* Octets of a path, as room 4's _TARGET has them; the query may have `?`,
 * backslash and the like as well. */
static bool is_target_octet(unsigned char octet, bool in_query)
{
    if (octet <= ' ' || octet >= 0x7f || octet == '#')
        return false;
    return in_query || octet != '\\';
}

static bool is_blank(char octet)
{
    return octet == ' ' || octet == '\t';
}

static bool is_text(text it, const char *other)
{
    return it.length == (Py_ssize_t)strlen(other)
           && !memcmp(it.octets, other, (size_t)it.length);
}

static bool begins(text it, const char *other)
{
    size_t length = strlen(other);
    return (size_t)it.length >= length && !memcmp(it.octets, other, length);
}

static bool is_one_of(text it, const char *const *words)
{
    for (; *words; words++)
        if (is_text(it, *words))
            return true;
    return false;
}

/* Whether a pair is a field, whose octets are borrowed then. */
static bool read_field(PyObject *pair, text *name, text *value)
{
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2)
        return false;
    PyObject *first = PyTuple_GET_ITEM(pair, 0);
    PyObject *second = PyTuple_GET_ITEM(pair, 1);
    if (!PyBytes_Check(first) || !PyBytes_Check(second))
        return false;
    *name = (text){PyBytes_AS_STRING(first), PyBytes_GET_SIZE(first)};
    *value = (text){PyBytes_AS_STRING(second), PyBytes_GET_SIZE(second)};
    return true;
}

static PyObject *decoded(PyObject *bytes)
{
    return PyUnicode_DecodeASCII(PyBytes_AS_STRING(bytes),
                                 PyBytes_GET_SIZE(bytes), NULL);
}

/* Whether a method, scheme and target are as usual. */
static bool is_usual_line(text method, text scheme, text target)
{
    bool in_query = false;
    if (!method.length || method.length > METHOD_BYTES
        || target.length > TARGET_BYTES || !begins(target, "/")
        || !(is_text(scheme, "https") || is_text(scheme, "http")))
        return false;
    for (Py_ssize_t n = 0; n < method.length; n++)
        if (!is_method_octet((unsigned char)method.octets[n]))
            return false;
    for (Py_ssize_t n = 0; n < target.length; n++) {
        in_query |= target.octets[n] == '?';
        if (!is_target_octet((unsigned char)target.octets[n], in_query))
            return false;
    }
    return true;
}

enum { METHOD, SCHEME, TARGET, AUTHORITY, PROTOCOL, PSEUDO_FIELDS };

/* Borrows the pseudo-fields; their number, or -1 where one is odd, doubled or
 * not in front. */
static Py_ssize_t read_pseudo(PyObject *fields, PyObject **pseudo)
{
    static const char *const names[] = {
        ":method", ":scheme", ":path", ":authority", ":protocol"};
    Py_ssize_t front = 0, n;
    int which;
    text name, value;
    for (n = 0; n < PyList_GET_SIZE(fields); n++) {
        PyObject *pair = PyList_GET_ITEM(fields, n);
        if (!read_field(pair, &name, &value))
            return -1;
        if (!begins(name, ":"))
            continue;
        for (which = 0; which < PSEUDO_FIELDS; which++)
            if (is_text(name, names[which]))
                break;
        if (n != front || which == PSEUDO_FIELDS || pseudo[which])
            return -1;
        pseudo[which] = PyTuple_GET_ITEM(pair, 1);
        front++;
    }
    return front;
}

static PyObject *request(PyObject *module, PyObject *fields)
{
    PyObject *pseudo[PSEUDO_FIELDS] = {NULL};
    text line[AUTHORITY];
    (void)module;
    Py_ssize_t front = PyList_Check(fields) ? read_pseudo(fields, pseudo) : -1;
    if (front < 0)
        Py_RETURN_NONE;
    for (int n = 0; n < AUTHORITY; n++) {
        if (!pseudo[n])
            Py_RETURN_NONE;
        line[n] = (text){PyBytes_AS_STRING(pseudo[n]),
                         PyBytes_GET_SIZE(pseudo[n])};
    }
    if (!is_usual_line(line[METHOD], line[SCHEME], line[TARGET]))
        Py_RETURN_NONE;
    return Py_BuildValue(
        "NNNOON", decoded(pseudo[METHOD]), decoded(pseudo[SCHEME]),
        decoded(pseudo[TARGET]),
        pseudo[AUTHORITY] ? pseudo[AUTHORITY] : Py_None,
        pseudo[PROTOCOL] ? pseudo[PROTOCOL] : Py_None,
        PyList_GetSlice(fields, front, PyList_GET_SIZE(fields)));
}

/* Whether a field of this name, in which `_` is `-`, is for an application. */
static bool may_pass(text name, bool trusted)
{
    static const char *const ends_here[] = {
        "keep-alive", "transfer-encoding", "upgrade", "content-length",
        "cookie", "forwarded", "host", "http2-settings", "proxy", "te", "via",
        "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", NULL};
    if (is_one_of(name, ends_here) || begins(name, "proxy-"))
        return false;
    return trusted || !(begins(name, "x-forwarded-")
                        || begins(name, "x-real-ip"));
}

static PyObject *passed(PyObject *module, PyObject *const *args,
                        Py_ssize_t count)
{
    char plain[NAME_BYTES];
    text name, value;
    (void)module;
    if (count != 2 || !PyList_Check(args[0]))
        Py_RETURN_NONE;
    PyObject *kept = PyList_New(0);
    for (Py_ssize_t n = 0; kept && n < PyList_GET_SIZE(args[0]); n++) {
        PyObject *pair = PyList_GET_ITEM(args[0], n);
        if (!read_field(pair, &name, &value) || !name.length
            || name.length > NAME_BYTES)
            goto unusual;
        for (Py_ssize_t k = 0; k < name.length; k++) {
            char octet = name.octets[k];
            if (!is_name_octet((unsigned char)octet))
                goto unusual;
            plain[k] = octet == '_' ? '-' : octet;
        }
        name.octets = plain;
        if (is_text(name, "connection"))
            goto unusual;
        if (may_pass(name, args[1] == Py_True) && PyList_Append(kept, pair))
            Py_CLEAR(kept);
    }
    return kept;
unusual:
    Py_DECREF(kept);
    Py_RETURN_NONE;
}

/* The fields of an answer, as far as they are read. */
typedef struct {
    PyObject *kept;
    PyObject *upgrade, *coding, *length; /* values, or NULL */
    bool is_odd;
} head;

/* A new pair with the name in lower case and the value without blanks around
 * it, which is the one that it was if it had both. */
static PyObject *trimmed(PyObject *pair, text *name, text *value)
{
    bool is_same = true;
    PyObject *first = PyTuple_GET_ITEM(pair, 0);
    PyObject *second = PyTuple_GET_ITEM(pair, 1);
    Py_ssize_t n;
    for (n = 0; n < name->length && is_same; n++)
        is_same = !(name->octets[n] >= 'A' && name->octets[n] <= 'Z');
    if (is_same) {
        Py_INCREF(first);
    } else {
        /* Made of octets, one of a single octet would be everybody's. */
        first = PyBytes_FromStringAndSize(NULL, name->length);
        if (!first)
            return NULL;
        char *octets = PyBytes_AS_STRING(first);
        for (n = 0; n < name->length; n++) {
            char octet = name->octets[n];
            octets[n] = octet >= 'A' && octet <= 'Z' ? octet + 32 : octet;
        }
        name->octets = octets;
    }
    while (value->length && is_blank(value->octets[value->length - 1]))
        value->length--;
    while (value->length && is_blank(*value->octets)) {
        value->octets++;
        value->length--;
    }
    if (value->length == PyBytes_GET_SIZE(second)) {
        Py_INCREF(second);
    } else {
        is_same = false;
        second = PyBytes_FromStringAndSize(value->octets, value->length);
    }
    PyObject *made = is_same ? Py_NewRef(pair)
                     : second ? PyTuple_Pack(2, first, second) : NULL;
    Py_DECREF(first);
    Py_XDECREF(second);
    return made;
}

/* Whether room 4's has_odd_field would find one in it. */
static bool is_odd(text name, text value)
{
    if (!name.length || name.length > NAME_BYTES)
        return true;
    for (Py_ssize_t n = 0; n < name.length; n++)
        if (!is_name_octet((unsigned char)name.octets[n]))
            return true;
    for (Py_ssize_t n = 0; n < value.length; n++) {
        unsigned char octet = (unsigned char)value.octets[n];
        if ((octet < ' ' && octet != '\t') || octet == 0x7f)
            return true;
    }
    return false;
}

/* Where the value of a field that is about the connection goes, or NULL. */
static PyObject **place_of(text name, head *it, PyObject **connection)
{
    if (is_text(name, "connection"))
        return connection;
    if (is_text(name, "upgrade"))
        return &it->upgrade;
    if (is_text(name, "transfer-encoding"))
        return &it->coding;
    return is_text(name, "content-length") ? &it->length : NULL;
}

/* Takes a pair in, which it steals; 1, or 0 where it is unusual, or -1 with
 * an error. */
static int take_in(head *it, PyObject *pair, text name, text value, bool bare,
                   PyObject **connection)
{
    static const char *const of_a_hop[] = {
        "", "connection", "keep-alive", "proxy-authenticate",
        "proxy-connection", "te", "transfer-encoding", "upgrade", NULL};
    PyObject **place = place_of(name, it, connection);
    int outcome = 1;
    if (place && *place)
        outcome = 0;
    else if (place)
        *place = Py_NewRef(PyTuple_GET_ITEM(pair, 1));
    if (!(is_one_of(name, of_a_hop)
          || (bare && is_text(name, "content-length")))) {
        it->is_odd |= is_odd(name, value);
        if (PyList_Append(it->kept, pair))
            outcome = -1;
    }
    Py_DECREF(pair);
    return outcome;
}

static PyObject *answer(PyObject *module, PyObject *const *args,
                        Py_ssize_t count)
{
    (void)module;
    if (count != 2 || !PyList_Check(args[0])
        || PyList_GET_SIZE(args[0]) > MOST_FIELDS || !PyLong_Check(args[1]))
        Py_RETURN_NONE;
    head it = {.kept = PyList_New(0)};
    PyObject *connection = NULL, *made = NULL;
    /* RFC 9110 section 8.6 */
    bool bare = PyLong_AsLong(args[1]) == 204;
    int outcome = it.kept ? 1 : -1;
    for (Py_ssize_t n = 0; outcome > 0 && n < PyList_GET_SIZE(args[0]); n++) {
        PyObject *pair = PyList_GET_ITEM(args[0], n);
        text name, value;
        if (!read_field(pair, &name, &value)) {
            outcome = 0;
            break;
        }
        pair = trimmed(pair, &name, &value);
        outcome = pair ? take_in(&it, pair, name, value, bare, &connection)
                       : -1;
    }
    if (connection && (PyBytes_GET_SIZE(connection) != 10
                       || memcmp(PyBytes_AS_STRING(connection), "keep-alive",
                                 10)))
        outcome = outcome < 0 ? outcome : 0;
    if (outcome > 0)
        made = Py_BuildValue(
            "OOOOO", it.kept, it.upgrade ? it.upgrade : Py_None,
            it.coding ? it.coding : Py_None, it.length ? it.length : Py_None,
            it.is_odd ? Py_True : Py_False);
    else if (!outcome)
        made = Py_NewRef(Py_None);
    Py_XDECREF(it.kept);
    Py_XDECREF(it.upgrade);
    Py_XDECREF(it.coding);
    Py_XDECREF(it.length);
    Py_XDECREF(connection);
    return made;
}

static PyMethodDef module_methods[] = {
    {"request", request, METH_O, request_doc},
    {"passed", (PyCFunction)(void (*)(void))passed, METH_FASTCALL, passed_doc},
    {"answer", (PyCFunction)(void (*)(void))answer, METH_FASTCALL, answer_doc},
    {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot module_slots[] = {{0, NULL}};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shimmercat_ext.native.fields",
    .m_doc = "Fields on their way between clients and applications.",
    .m_methods = module_methods,
    .m_slots = module_slots};

PyMODINIT_FUNC PyInit_fields(void)
{
    return PyModuleDef_Init(&module_definition);
}
