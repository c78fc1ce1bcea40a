// The keywords of a call from Python, each read by its name where it goes.
#pragma once

#include <common/operands.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

namespace sparsebert {

// TypeError where a keyword is missing, is no number, or is none of those that were read.
class Fields {
  public:
    Fields(const char* op, const pybind11::kwargs& given) : op_(op), given_(given) {}

    template <typename Value>
    Value need(const char* name) {
        const pybind11::handle found = find(name);
        if (!found) refuse(std::string(name) + " is missing, expected it as a keyword");
        return as<Value>(name, found);
    }

    template <typename Value>
    Value get(const char* name, Value otherwise = {}) {
        const pybind11::handle found = find(name);
        return found ? as<Value>(name, found) : otherwise;
    }

    // After the last of them.
    void finish() const {
        if (found_ == given_.size()) return;
        for (const auto& [key, value] : given_) {
            const auto name = pybind11::cast<std::string>(key);
            if (std::find(names_.begin(), names_.end(), name) == names_.end()) refuse(name + " is no keyword of it");
        }
    }

  private:
    pybind11::handle find(const char* name) {
        names_.push_back(name);
        const pybind11::handle found = PyDict_GetItemString(given_.ptr(), name);
        found_ += found ? 1 : 0;
        return found;
    }

    template <typename Value>
    Value as(const char* name, pybind11::handle found) const {
        if constexpr (std::is_enum_v<Value>) {
            return static_cast<Value>(as<int>(name, found));
        } else {
            pybind11::detail::make_caster<Value> caster;
            if (!caster.load(found, true)) {
                refuse(std::string(name) + " is " + pybind11::repr(found).cast<std::string>() + ", expected a number");
            }
            return pybind11::detail::cast_op<Value>(caster);
        }
    }

    [[noreturn]] void refuse(const std::string& text) const {
        throw pybind11::type_error(std::string(op_) + ": " + text);
    }

    const char* op_;
    const pybind11::kwargs& given_;
    std::vector<const char*> names_;
    size_t found_ = 0;
};

// What all products are called with: a call is `Operands`, and has a problem and more of its own.
template <typename Call>
void read_product(Fields& fields, Call& call) {
    auto& problem = call.problem;
    problem.element = fields.need<Element>("element");
    problem.tokens = fields.need<int>("tokens");
    problem.in_features = fields.need<int>("in_features");
    problem.out_features = fields.need<int>("out_features");
    problem.rank = fields.get<int>("rank");
    call.x = fields.need<uint64_t>("x");
    call.x_stride = fields.need<int64_t>("x_stride");
    call.values = fields.need<uint64_t>("values");
    call.t = fields.get<uint64_t>("t");
    call.u = fields.get<uint64_t>("u");
    call.bias = fields.get<uint64_t>("bias");
    call.bias_number = fields.get("bias_number", Number::float32);
    call.residual = fields.get<uint64_t>("residual");
    call.x_scale = fields.get<uint64_t>("x_scale");
    call.scale = fields.get<uint64_t>("scale");
    call.y = fields.need<uint64_t>("y");
    call.y_number = fields.need<Number>("y_number");
    call.alpha = fields.get("alpha", 1.0f);
    call.device = fields.need<int>("device");
    call.stream = fields.need<uint64_t>("stream");
}

// And where the result may have an activation, or be int8 by a given scale.
template <typename Call>
void read_result(Fields& fields, Call& call) {
    call.activation = fields.get<int>("activation");
    call.output_scale = fields.get<uint64_t>("output_scale");
    call.y_scale = fields.get<uint64_t>("y_scale");
}

}  // namespace sparsebert
