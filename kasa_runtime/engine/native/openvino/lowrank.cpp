// The low-rank branches beside linear layers, as OpenVINO operations:
//
//     h[i, j] = c_j (x[i] . a_j)                 Shrink, on the input x of one or several layers
//     y[i] += sum_j  h[i, j] b_j                 Expand, on the product y of one of them
//     y[i] += z[i] + sum_j  h[i, j] b_j          ExpandAdd: and the residual stream
//     silu(y[i]) y'[i]                           ExpandGated: of two layers, and Shrink for the next one
//
// and, where the weight W is float32 (`product.hpp`), the product with it too:
//
//     y[i] = x[i] W^T + sum_j  h[i, j] b_j       Linears, of one or several layers on the same x
//     y[i] += z[i]                               LinearAdd: of one layer, and the residual stream
//     down(silu(gate(x)) up(x)) + z              GatedMlp, GatedMlpAdd: of three layers
//
// over the terms j of row i's adapter. A term is one column of an adapter's factors, or of the shared
// tail with c = -1. Its two vectors are rows of the caller's memory, so nothing is copied when an
// adapter comes, goes or is merged; the work of a step grows with the adapters of its rows and not
// with those that are loaded.
//
// Rows with the same adapter form a unit, which is cut into blocks; what a block needs of a factor is
// read once. Everything float32; sums over the input are float32 too.
//
// h is handed over in memory of its own: all operations then are elementwise to the plugin, which
// knows the results' shapes without asking, and asking costs more than the work of a step. What they
// do beside the terms spares a pass over y, and the operations that would do it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "product.hpp"

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/util/binary_elementwise_arithmetic.hpp>
#include <openvino/op/util/unary_elementwise_arithmetic.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

namespace kasa {

constexpr int64_t kRows = 16;     // of a block
constexpr int64_t kColumns = 64;  // outputs that are summed in registers
constexpr int64_t kStrip = 4 * kColumns;
constexpr int64_t kGate = 20;  // what an activation costs in multiplications
constexpr int64_t kSerial = 1 << 15;  // multiplications below which threads cost more than they save

struct Term {
    const float* a;  // (in,)
    const float* b;  // (out,)
    float c;
};

// Of a layer, packed: see `product.hpp`.
struct Weight {
    const float* packed;  // null: not ours to multiply
    int64_t out, in;
};

struct Unit {
    int32_t set;  // whose terms; -1: none
    int32_t first, count;  // rows, as indices into Step::rows
};

struct Step {
    std::vector<int32_t> rows;
    std::vector<Unit> blocks;
};

// The terms of every layer by set (what one unit adds), and the units of the current step: [0] of
// all its tokens, [1] of those whose logits are wanted.
struct Table {
    std::vector<std::vector<std::vector<Term>>> terms;
    std::vector<Weight> weights;
    std::vector<std::vector<float>> hidden;  // h of every layer, rows in the order of Step::rows
    std::vector<float> gate, up;  // of one GatedMlp at a time
    Step steps[2];

    const std::vector<Term>& of(int64_t layer, const Unit& block) const {
        static const std::vector<Term> none;
        return block.set < 0 ? none : terms[layer][block.set];
    }

    // Between two rows of `hidden`.
    int64_t stride(int64_t layer, const Step& step) const {
        size_t longest = 0;
        for (const Unit& block : step.blocks) longest = std::max(longest, of(layer, block).size());
        return static_cast<int64_t>(longest);
    }
};

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < 16; ++i) total += v[i];
    return total;
}

// h[j] = c_j (x . a_j)
void shrink(const float* x, int64_t in, const std::vector<Term>& terms, float* h) {
    const int64_t count = terms.size();
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const float *a0 = terms[j].a, *a1 = terms[j + 1].a, *a2 = terms[j + 2].a, *a3 = terms[j + 3].a;
        Vec s0{}, s1{}, s2{}, s3{};
        int64_t k = 0;
        for (; k + 16 <= in; k += 16) {
            const Vec v = load(x + k);
            s0 += v * load(a0 + k);
            s1 += v * load(a1 + k);
            s2 += v * load(a2 + k);
            s3 += v * load(a3 + k);
        }
        float t0 = sum(s0), t1 = sum(s1), t2 = sum(s2), t3 = sum(s3);
        for (; k < in; ++k) {
            t0 += x[k] * a0[k];
            t1 += x[k] * a1[k];
            t2 += x[k] * a2[k];
            t3 += x[k] * a3[k];
        }
        h[j] = terms[j].c * t0;
        h[j + 1] = terms[j + 1].c * t1;
        h[j + 2] = terms[j + 2].c * t2;
        h[j + 3] = terms[j + 3].c * t3;
    }
    for (; j < count; ++j) {
        Vec s{};
        int64_t k = 0;
        for (; k + 16 <= in; k += 16) s += load(x + k) * load(terms[j].a + k);
        float t = sum(s);
        for (; k < in; ++k) t += x[k] * terms[j].a[k];
        h[j] = terms[j].c * t;
    }
}

// y[k - first] = y0[k] + sum_j h[j] b_j[k] for first <= k < last
void expand(const float* y0, float* y, int64_t first, int64_t last, const std::vector<Term>& terms,
            const float* h) {
    int64_t k = first;
    for (; k + kColumns <= last; k += kColumns) {
        Vec s[4];
        for (int v = 0; v < 4; ++v) s[v] = load(y0 + k + 16 * v);
        for (size_t j = 0; j < terms.size(); ++j)
            for (int v = 0; v < 4; ++v) s[v] += h[j] * load(terms[j].b + k + 16 * v);
        for (int v = 0; v < 4; ++v) store(y + k - first + 16 * v, s[v]);
    }
    for (; k + 16 <= last; k += 16) {
        Vec s = load(y0 + k);
        for (size_t j = 0; j < terms.size(); ++j) s += h[j] * load(terms[j].b + k);
        store(y + k - first, s);
    }
    for (; k < last; ++k) {
        float total = y0[k];
        for (size_t j = 0; j < terms.size(); ++j) total += h[j] * terms[j].b[k];
        y[k - first] = total;
    }
}

// e^x for every x <= 0, within 2 units in the last place; 0 below -87.
inline Vec exp_negative(Vec x) {
    using Int = int32_t __attribute__((vector_size(64)));
    x = x < -87.0f ? Vec{} - 87.0f : x;
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 2^23: rounds to an integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = Vec{} + 1.9875691500e-4f;
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                          5.0000001201e-1f, 1.0f, 1.0f})
        p = p * r + c;
    return p * (Vec)((__builtin_convertvector(n, Int) + 127) << 23);
}

// x / (1 + e^-x), with e^-|x| so that nothing overflows
inline Vec silu(Vec x) {
    const Vec e = exp_negative(x < 0.0f ? x : -x);
    return x * (x < 0.0f ? e : Vec{} + 1.0f) / (1.0f + e);
}

// out = silu(gate) up
void gated(const float* gate, const float* up, float* out, int64_t count) {
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) store(out + k, silu(load(gate + k)) * load(up + k));
    for (; k < count; ++k) out[k] = silu(Vec{} + gate[k])[0] * up[k];
}

// Call task(i) for i < count, on all threads where there is enough to do.
template <typename Task>
void run_all(int64_t count, int64_t num_multiplications, const Task& task) {
    if (num_multiplications < kSerial)
        for (int64_t i = 0; i < count; ++i) task(i);
    else
        tbb::parallel_for(int64_t(0), count, task);
}

// Call task(block, first, last) for all blocks and strips of the `width` columns. All b_j of a strip
// stay in the first cache while it serves the rows of a block.
template <typename Task>
void run_strips(const Step& step, int64_t width, int64_t num_multiplications, const Task& task) {
    const int64_t num_strips = (width + kStrip - 1) / kStrip;
    run_all(num_strips * step.blocks.size(), num_multiplications, [&](int64_t index) {
        const int64_t first = index % num_strips * kStrip;
        task(step.blocks[index / num_strips], first, std::min(width, first + kStrip));
    });
}

// Fill `hidden` of the layers that read x (num_rows, in).
void shrink_all(Table& table, const Step& step, const std::vector<int64_t>& layers, const float* x,
                int64_t num_rows, int64_t in) {
    int64_t work = 0;
    std::vector<int64_t> strides;
    for (const int64_t layer : layers) {
        strides.push_back(table.stride(layer, step));
        table.hidden[layer].resize(num_rows * strides.back());
        work += num_rows * strides.back() * in;
    }
    if (!work) return;
    const int64_t num_layers = layers.size();
    run_all(num_layers * step.blocks.size(), work, [&](int64_t index) {
        const int64_t layer = layers[index % num_layers], stride = strides[index % num_layers];
        const Unit& block = step.blocks[index / num_layers];
        for (int32_t i = block.first; i < block.first + block.count; ++i)
            shrink(x + step.rows[i] * in, in, table.of(layer, block),
                   table.hidden[layer].data() + i * stride);
    });
}

// y = y0 + z + sum_j h_j b_j of one layer, all (num_rows, out); z may be null.
void expand_all(Table& table, const Step& step, int64_t layer, const float* y0, const float* z, float* y,
                int64_t num_rows, int64_t out) {
    const int64_t stride = table.stride(layer, step);
    const float* h = table.hidden[layer].data();
    run_strips(step, out, num_rows * out * (1 + stride), [&](const Unit& block, int64_t first, int64_t last) {
        for (int32_t i = block.first; i < block.first + block.count; ++i) {
            const int64_t row = step.rows[i] * out;
            expand(y0 + row, y + row + first, first, last, table.of(layer, block), h + i * stride);
            for (int64_t k = first; z && k < last; ++k) y[row + k] += z[row + k];
        }
    });
}

// A part of a product: some rows, some panels.
struct Part {
    int64_t row, end_row, panel, end_panel;
};

void multiply_part(const Weight& weight, const Part& part, const float* x, float* y) {
    multiply(x + part.row * weight.in, part.end_row - part.row, weight.in, weight.packed, weight.out,
             y + part.row * weight.out, part.panel, part.end_panel);
}

// y += z + sum_j h_j b_j in a part of one layer's y (num_rows, out); z may be null.
void add_terms(const Table& table, const Step& step, int64_t layer, const Part& part, const float* z,
               float* y) {
    const int64_t out = table.weights[layer].out, stride = table.stride(layer, step);
    const int64_t first = part.panel * kPanel, last = std::min(part.end_panel * kPanel, out);
    const float* h = table.hidden[layer].data();
    for (int64_t row = part.row; z && row < part.end_row; ++row)
        for (int64_t k = first; k < last; ++k) y[row * out + k] += z[row * out + k];
    if (!stride) return;
    for (const Unit& block : step.blocks)
        for (int32_t i = block.first; i < block.first + block.count; ++i) {
            const int64_t row = step.rows[i];
            if (row < part.row || row >= part.end_row) continue;
            float* at = y + row * out + first;
            expand(y + row * out, at, first, last, table.of(layer, block), h + i * stride);
        }
}

// to = from + sum_j c_j b_j a_j^T for `kSteps` inputs from k on, of one panel; b has the panel's part of
// all c_j b_j.
template <int kSteps>
void fold_inputs(const std::vector<Term>& terms, const float* b, int64_t k, const float* from, float* to) {
    Vec low[kSteps], high[kSteps];
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
        low[s] = load(from + s * kPanel);
        high[s] = load(from + s * kPanel + 16);
        prefetch(from + s * kPanel + kAhead);
        prefetch(from + s * kPanel + kAhead + 16);
    }
    for (size_t j = 0; j < terms.size(); ++j) {
        const Vec b_low = load(b + j * kPanel), b_high = load(b + j * kPanel + 16);
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; ++s) {
            low[s] += terms[j].a[k + s] * b_low;
            high[s] += terms[j].a[k + s] * b_high;
        }
    }
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
        store_past_cache(to + s * kPanel, low[s]);
        store_past_cache(to + s * kPanel + 16, high[s]);
    }
}

// to = from + sum_j c_j b_j a_j^T, packed.
void fold(const std::vector<Term>& terms, const Weight& shape, const float* from, float* to) {
    std::vector<float> b(terms.size() * kPanel);
    for (int64_t first = 0; first < shape.out; first += kPanel) {
        const int64_t width = std::min(kPanel, shape.out - first);
        for (size_t j = 0; j < terms.size(); ++j)
            for (int64_t i = 0; i < width; ++i) b[j * kPanel + i] = terms[j].c * terms[j].b[first + i];
        int64_t k = 0;
        for (; k + 8 <= shape.in; k += 8, from += 8 * kPanel, to += 8 * kPanel)
            fold_inputs<8>(terms, b.data(), k, from, to);
        for (; k < shape.in; ++k, from += kPanel, to += kPanel)
            fold_inputs<1>(terms, b.data(), k, from, to);
    }
    end_stores_past_cache();
}

// Call task(i, part) for parts of layers[i] until all panels of all have served all rows, in chunks of
// rows so that what one chunk reads and writes stays in the second cache.
template <typename Task>
void run_parts(const Table& table, const std::vector<int64_t>& layers, int64_t num_rows, const Task& task) {
    std::vector<int64_t> begins{0};
    for (const int64_t layer : layers)
        begins.push_back(begins.back() + num_panels(table.weights[layer].out));
    const int64_t all = begins.back(), num_chunks = (num_rows + kChunk - 1) / kChunk;
    tbb::parallel_for(tbb::blocked_range<int64_t>(0, num_chunks * all), [&](const auto& range) {
        for (int64_t chunk = range.begin() / all; chunk * all < range.end(); ++chunk)
            for (size_t i = 0; i < layers.size(); ++i) {
                const int64_t begin = chunk * all + begins[i];
                const int64_t panel = std::max(range.begin() - begin, int64_t(0));
                const int64_t end_panel = std::min(range.end() - begin, begins[i + 1] - begins[i]);
                if (panel < end_panel)
                    task(i, Part{num_rows * chunk / num_chunks, num_rows * (chunk + 1) / num_chunks, panel,
                                 end_panel});
            }
    }, tbb::static_partitioner());
}

// y[i] = x W_i^T + z + sum_j h_j b_j of layers that read x (num_rows, in); z may be null.
void project(Table& table, const Step& step, const std::vector<int64_t>& layers, const float* x,
             const float* z, const std::vector<float*>& y, int64_t num_rows, int64_t in) {
    shrink_all(table, step, layers, x, num_rows, in);
    run_parts(table, layers, num_rows, [&](size_t i, const Part& part) {
        multiply_part(table.weights[layers[i]], part, x, y[i]);
        add_terms(table, step, layers[i], part, z, y[i]);
    });
}

// table.gate = silu(gate(x)) up(x), (num_rows, out).
void project_gated(Table& table, const Step& step, int64_t gate, int64_t up, const float* x, int64_t num_rows,
                   int64_t in) {
    const int64_t width = table.weights[gate].out;
    table.gate.resize(num_rows * width);
    table.up.resize(num_rows * width);
    const int64_t layers[] = {gate, up};
    float* y[] = {table.gate.data(), table.up.data()};
    shrink_all(table, step, {gate, up}, x, num_rows, in);
    run_parts(table, {gate}, num_rows, [&](size_t, const Part& part) {
        for (int i = 0; i < 2; ++i) {
            multiply_part(table.weights[layers[i]], part, x, y[i]);
            add_terms(table, step, layers[i], part, nullptr, y[i]);
        }
        const int64_t first = part.panel * kPanel, last = std::min(part.end_panel * kPanel, width);
        for (int64_t row = part.row; row < part.end_row; ++row)
            gated(y[0] + row * width + first, y[1] + row * width + first, y[0] + row * width + first,
                  last - first);
    });
}

using Sources = std::vector<const float*>;
using Results = std::vector<float*>;

struct One : ov::op::util::UnaryElementwiseArithmetic {
    OPENVINO_OP("One", "kasa", ov::op::util::UnaryElementwiseArithmetic);
};

struct Two : ov::op::util::BinaryElementwiseArithmetic {
    OPENVINO_OP("Two", "kasa", ov::op::util::BinaryElementwiseArithmetic);
    Two() : BinaryElementwiseArithmetic(ov::op::AutoBroadcastType::NUMPY) {}
};

// What the operations are: float32 inputs of one shape, a row per token, and a result of this shape.
// Derived gives `run`, Inputs says how many there are.
template <typename Derived, typename Inputs>
class RowWise : public Inputs {
public:
    RowWise() = default;
    RowWise(const ov::OutputVector& arguments, const RowWise& like)
        : table_(like.table_), layers_(like.layers_), next_(like.next_), sizes_(like.sizes_),
          step_(like.step_) {
        this->set_arguments(arguments);
        this->constructor_validate_and_infer_types();
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& arguments) const override {
        return std::make_shared<Derived>(arguments, *this);
    }

    void validate_and_infer_types() override {
        this->set_output_type(0, this->get_input_element_type(0), this->get_input_partial_shape(0));
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("table", table_);
        visitor.on_attribute("layers", layers_);
        visitor.on_attribute("next", next_);
        visitor.on_attribute("sizes", sizes_);
        visitor.on_attribute("step", step_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        Table& table = *reinterpret_cast<Table*>(table_);
        const Step& step = table.steps[step_];
        const size_t size = inputs[0].get_size(), num_rows = step.rows.size();
        if (size == 0) return true;  // no logits are wanted
        OPENVINO_ASSERT(num_rows && size % num_rows == 0, "want a row for each of ", num_rows,
                        " tokens, got ", inputs[0].get_shape());
        Sources rows;
        for (const ov::Tensor& input : inputs) {
            OPENVINO_ASSERT(input.get_size() == size, "want inputs of one shape, got ",
                            inputs[0].get_shape(), " and ", input.get_shape());
            rows.push_back(input.data<const float>());
        }
        Results results;
        for (ov::Tensor& output : outputs) results.push_back(output.data<float>());
        static_cast<const Derived*>(this)->run(table, step, rows, results, num_rows, size / num_rows);
        return true;
    }

protected:
    int64_t table_ = 0;
    std::vector<int64_t> layers_, next_;  // next_: those that read the result
    std::vector<int64_t> sizes_;  // out features of each layer, where results have a width of their own
    int64_t step_ = 0;
};

// The identity, which nothing is moved across: of a unary operation the plugin believes that it may
// change places with one that only moves data, such as the choice of the rows of the logits.
class Barrier : public ov::op::Op {
public:
    OPENVINO_OP("Barrier", "kasa");

    Barrier() = default;
    explicit Barrier(const ov::OutputVector& arguments) : Op(arguments) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& arguments) const override {
        return std::make_shared<Barrier>(arguments);
    }

    bool visit_attributes(ov::AttributeVisitor&) override { return true; }
    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        outputs[0].set_shape(inputs[0].get_shape());
        std::memcpy(outputs[0].data(), inputs[0].data(), inputs[0].get_byte_size());
        return true;
    }
};

class Shrink : public RowWise<Shrink, One> {
public:
    OPENVINO_OP("Shrink", "kasa", One);
    using RowWise::RowWise;

    void run(Table& table, const Step& step, const Sources& inputs, const Results& copy, int64_t num_rows,
             int64_t in) const {
        std::memcpy(copy[0], inputs[0], num_rows * in * sizeof(float));
        shrink_all(table, step, layers_, copy[0], num_rows, in);
    }
};

class Expand : public RowWise<Expand, One> {
public:
    OPENVINO_OP("Expand", "kasa", One);
    using RowWise::RowWise;

    void run(Table& table, const Step& step, const Sources& inputs, const Results& y, int64_t num_rows,
             int64_t out) const {
        expand_all(table, step, layers_[0], inputs[0], nullptr, y[0], num_rows, out);
    }
};

class ExpandAdd : public RowWise<ExpandAdd, Two> {
public:
    OPENVINO_OP("ExpandAdd", "kasa", Two);
    using RowWise::RowWise;

    void run(Table& table, const Step& step, const Sources& inputs, const Results& y, int64_t num_rows,
             int64_t out) const {
        expand_all(table, step, layers_[0], inputs[0], inputs[1], y[0], num_rows, out);
    }
};

class ExpandGated : public RowWise<ExpandGated, Two> {
public:
    OPENVINO_OP("ExpandGated", "kasa", Two);
    using RowWise::RowWise;

    void run(Table& table, const Step& step, const Sources& inputs, const Results& y, int64_t num_rows,
             int64_t out) const {
        const int64_t gate = layers_[0], up = layers_[1];
        const int64_t strides[] = {table.stride(gate, step), table.stride(up, step)};
        const float* h[] = {table.hidden[gate].data(), table.hidden[up].data()};
        const int64_t work = num_rows * out * (kGate + strides[0] + strides[1]);
        run_strips(step, out, work, [&](const Unit& block, int64_t first, int64_t last) {
            float strip[2][kStrip];
            for (int32_t i = block.first; i < block.first + block.count; ++i) {
                const int64_t row = step.rows[i] * out;
                for (int k = 0; k < 2; ++k)
                    expand(inputs[k] + row, strip[k], first, last, table.of(layers_[k], block),
                           h[k] + i * strides[k]);
                gated(strip[0], strip[1], y[0] + row + first, last - first);
            }
        });
        shrink_all(table, step, next_, y[0], num_rows, out);
    }
};

// One or several layers that read the same x; as they give it another width, the plugin asks for the
// shapes of the results.
class Linears : public RowWise<Linears, ov::op::Op> {
public:
    OPENVINO_OP("Linears", "kasa");

    Linears() = default;
    Linears(const ov::OutputVector& arguments, const RowWise& like) : RowWise(arguments, like) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        ov::PartialShape shape = get_input_partial_shape(0);
        set_output_size(sizes_.size());
        for (size_t i = 0; i < sizes_.size(); ++i) {
            shape[shape.size() - 1] = sizes_[i];
            set_output_type(i, get_input_element_type(0), shape);
        }
    }

    void run(Table& table, const Step& step, const Sources& inputs, const Results& y, int64_t num_rows,
             int64_t in) const {
        project(table, step, layers_, inputs[0], nullptr, y, num_rows, in);
    }
};

class LinearAdd : public RowWise<LinearAdd, Two> {
public:
    OPENVINO_OP("LinearAdd", "kasa", Two);
    using RowWise::RowWise;

    void run(Table& table, const Step& step, const Sources& inputs, const Results& y, int64_t num_rows,
             int64_t in) const {
        project(table, step, layers_, inputs[0], inputs[1], y, num_rows, in);
    }
};

// y = down(silu(gate(x)) up(x)) + z of layers = {gate, up, down}; z may be null.
void gated_mlp(Table& table, const Step& step, const std::vector<int64_t>& layers, const float* x,
               const float* z, const std::vector<float*>& y, int64_t num_rows, int64_t in) {
    project_gated(table, step, layers[0], layers[1], x, num_rows, in);
    project(table, step, {layers[2]}, table.gate.data(), z, y, num_rows, table.weights[layers[0]].out);
}

class GatedMlp : public RowWise<GatedMlp, One> {
public:
    OPENVINO_OP("GatedMlp", "kasa", One);
    using RowWise::RowWise;

    void run(Table& table, const Step& step, const Sources& inputs, const Results& y, int64_t num_rows,
             int64_t in) const {
        gated_mlp(table, step, layers_, inputs[0], nullptr, y, num_rows, in);
    }
};

class GatedMlpAdd : public RowWise<GatedMlpAdd, Two> {
public:
    OPENVINO_OP("GatedMlpAdd", "kasa", Two);
    using RowWise::RowWise;

    void run(Table& table, const Step& step, const Sources& inputs, const Results& y, int64_t num_rows,
             int64_t in) const {
        gated_mlp(table, step, layers_, inputs[0], inputs[1], y, num_rows, in);
    }
};

}  // namespace kasa

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<kasa::Shrink>>(), std::make_shared<ov::OpExtension<kasa::Expand>>(),
     std::make_shared<ov::OpExtension<kasa::ExpandAdd>>(),
     std::make_shared<ov::OpExtension<kasa::ExpandGated>>(),
     std::make_shared<ov::OpExtension<kasa::Barrier>>(),
     std::make_shared<ov::OpExtension<kasa::Linears>>(), std::make_shared<ov::OpExtension<kasa::LinearAdd>>(),
     std::make_shared<ov::OpExtension<kasa::GatedMlp>>(),
     std::make_shared<ov::OpExtension<kasa::GatedMlpAdd>>()}));

extern "C" {

// shapes: (out, in) of each layer.
kasa::Table* kasa_table_new(int64_t num_layers, const int64_t* shapes, int64_t num_sets) {
    auto* table = new kasa::Table;
    for (int64_t i = 0; i < num_layers; ++i)
        table->weights.push_back({nullptr, shapes[2 * i], shapes[2 * i + 1]});
    table->terms.assign(num_layers, std::vector<std::vector<kasa::Term>>(num_sets));
    table->hidden.resize(num_layers);
    return table;
}

// From now on packed[i] is the weight of layers[i].
void kasa_table_use(kasa::Table* table, int64_t count, const int64_t* layers, const float* const* packed) {
    for (int64_t i = 0; i < count; ++i) table->weights[layers[i]].packed = packed[i];
}

// to[i] = from[i] + sum_j c_j b_j a_j^T over a set's terms of layers[i]; all packed, and from[i] may be
// to[i].
void kasa_table_fold(const kasa::Table* table, int64_t set, int64_t count, const int64_t* layers,
                     const float* const* from, float* const* to) {
    tbb::task_arena arena(tbb::task_arena::automatic, 1, tbb::task_arena::priority::low);  // steps come first
    arena.execute([=] {
        tbb::parallel_for(int64_t(0), count, [=](int64_t i) {
            kasa::fold(table->terms[layers[i]][set], table->weights[layers[i]], from[i], to[i]);
        });
    });
}

// Of weight (out, in), whose element (i, k) lies at i out_stride + k in_stride.
void kasa_pack(const float* weight, int64_t out, int64_t in, int64_t out_stride, int64_t in_stride,
               float* packed) {
    tbb::parallel_for(int64_t(0), kasa::num_panels(out), [=](int64_t panel) {
        const int64_t first = panel * kasa::kPanel, width = std::min(kasa::kPanel, out - first);
        const float* rows = weight + first * out_stride;
        float* to = packed + first * in;
        for (int64_t k = 0; k < in; ++k, to += kasa::kPanel)
            for (int64_t i = 0; i < kasa::kPanel; ++i)
                to[i] = i < width ? rows[i * out_stride + k * in_stride] : 0;
    });
}

void kasa_table_free(kasa::Table* table) { delete table; }

// Add the first to last row of A (rank, in) and B (rank, out) to a set; nothing is copied.
void kasa_table_add(kasa::Table* table, int64_t layer, int64_t set, const float* a, int64_t in,
                    const float* b, int64_t out, int64_t rank, float c) {
    auto& terms = table->terms[layer][set];
    for (int64_t j = 0; j < rank; ++j) terms.push_back({a + j * in, b + j * out, c});
}

// Empty a set in all layers.
void kasa_table_clear(kasa::Table* table, int64_t set) {
    for (auto& sets : table->terms) sets[set].clear();
}

// While the adapter `merged` is in the weights, a row of slot s needs set num_slots + s and a row of
// the base set 2 num_slots; where it is negative these sets become empty.
void kasa_table_merge(kasa::Table* table, int64_t num_slots, int64_t merged) {
    for (auto& sets : table->terms)
        for (int64_t s = 0; s <= num_slots; ++s) {
            auto& terms = sets[num_slots + s];
            terms.clear();
            if (merged < 0) continue;
            if (s < num_slots) terms = sets[s];
            for (kasa::Term term : sets[merged]) {
                term.c = -term.c;
                terms.push_back(term);
            }
        }
}

// sets[i] is the set of row i, -1 for none.
void kasa_table_step(kasa::Table* table, int64_t which, const int32_t* sets, int64_t num_rows) {
    kasa::Step& step = table->steps[which];
    step.rows.resize(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) step.rows[i] = static_cast<int32_t>(i);
    std::stable_sort(step.rows.begin(), step.rows.end(),
                     [&](int32_t i, int32_t j) { return sets[i] < sets[j]; });
    step.blocks.clear();
    for (int32_t i = 0; i < num_rows; ++i) {
        const int32_t set = sets[step.rows[i]];
        if (step.blocks.empty() || step.blocks.back().set != set || step.blocks.back().count == kasa::kRows)
            step.blocks.push_back({set, i, 0});
        ++step.blocks.back().count;
    }
}

}
