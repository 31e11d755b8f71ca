// Runs cases of the CUDA kernels' ops, as they come on the standard input, and answers on the standard
// output.
//
// A case is a line `op numbers tensors`, a line `name value` for each number, and for each tensor a line
// `name role lead bytes`, followed by the bytes if the role is "in" or "inout". The number "seeds" says how
// many shuffled orders there are beside forward and reversed. The answer is a line `ok`, followed by the
// bytes of "inout" and "out" tensors, or a line `error what`. Whatever the order, and on used scratch, bits
// must be the same.
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <stdexcept>

#include "cases.h"

namespace cases {

namespace {

std::map<std::string, Op>& ops() {
  static std::map<std::string, Op> known;
  return known;
}

Role role_of(const std::string& word) {
  static const std::map<std::string, Role> kRoles{{"in", Role::kIn},
                                                  {"inout", Role::kInOut},
                                                  {"out", Role::kOut},
                                                  {"scratch", Role::kScratch},
                                                  {"counters", Role::kCounters}};
  return kRoles.at(word);
}

bool comes_with_bytes(Role role) { return role == Role::kIn || role == Role::kInOut; }
bool goes_back(Role role) { return role == Role::kOut || role == Role::kInOut; }

bool read(Case& one) {
  size_t numbers = 0, tensors = 0;
  if (!(std::cin >> one.op >> numbers >> tensors)) return false;
  std::string name, role;
  for (; numbers > 0; --numbers) {
    std::cin >> name;
    std::cin >> one.numbers[name];
  }
  for (; tensors > 0; --tensors) {
    Tensor& tensor = one.tensors.emplace_back();
    std::cin >> tensor.name >> role >> tensor.lead >> tensor.bytes;
    std::cin.get();
    tensor.role = role_of(role);
    const char fresh = tensor.role == Role::kCounters ? 0 : static_cast<char>(0xff);
    tensor.given.assign(tensor.bytes, fresh);
    if (comes_with_bytes(tensor.role)) std::cin.read(tensor.given.data(), tensor.given.size());
  }
  if (!std::cin) throw std::runtime_error("a case that ends early");
  return true;
}

// What does not hold after a launch; `first` is what the first launch of all gave.
std::string check(const Case& one, std::vector<std::vector<char>>& first) {
  size_t at = 0;
  for (const Tensor& tensor : one.tensors) {
    if (tensor.role == Role::kIn || tensor.role == Role::kCounters) {
      if (std::memcmp(tensor.data(), tensor.given.data(), tensor.bytes) != 0)
        return tensor.name + " was written";
    } else if (goes_back(tensor.role)) {
      std::vector<char> now(tensor.data(), tensor.data() + tensor.bytes);
      if (at == first.size()) first.push_back(now);
      const auto differs = std::mismatch(now.begin(), now.end(), first[at++].begin()).first - now.begin();
      if (differs < static_cast<ptrdiff_t>(tensor.bytes)) {
        return tensor.name + " differs from the first launch's, from byte " + std::to_string(differs) + " on";
      }
    }
  }
  return "";
}

constexpr int kSecondsACase = 40;  // of computing; one takes 5 at most

// A loop that does not end, around barriers or not, ends here.
void limit_time() {
  signal(SIGPROF, [](int) {
    constexpr char kWords[] = "ERROR: a case does not come to an end\n";
    if (write(STDERR_FILENO, kWords, sizeof(kWords) - 1) < 0) _exit(2);
    _exit(1);
  });
  const itimerval limit{{0, 0}, {kSecondsACase, 0}};
  setitimer(ITIMER_PROF, &limit, nullptr);
}

// Empty, or what is wrong, in which order.
std::string run(Case& one, std::vector<std::vector<char>>& results) {
  const auto op = ops().find(one.op);
  if (op == ops().end()) return "no such op: " + one.op;
  const int64_t seeds = one.number("seeds");
  for (int64_t i = 0; i < 2 + seeds; ++i) {
    one.order = i == 0   ? cuda_host::Order::kForward
                : i == 1 ? cuda_host::Order::kReversed
                         : cuda_host::Order::kShuffled;
    one.seed = static_cast<uint64_t>(i);
    std::string order = i == 0 ? "forward" : i == 1 ? "reversed" : "seed " + std::to_string(i);
    for (Tensor& tensor : one.tensors) tensor.allocate();
    one.scratch_of_order.clear();
    // Twice in the first orders: the second time on used scratch.
    for (int time = 0; time < (i < 2 ? 2 : 1); ++time) {
      for (Tensor& tensor : one.tensors) {
        if (time > 0 && tensor.role != Role::kScratch && tensor.role != Role::kCounters) tensor.fill();
      }
      if (time > 0) order += ", second launch";
      std::string wrong;
      try {
        wrong = op->second(one);
      } catch (const std::exception& error) {
        wrong = error.what();
      }
      if (wrong.empty()) wrong = check(one, results);
      if (!wrong.empty()) return order + ": " + wrong;
    }
  }
  return "";
}

}  // namespace

void Tensor::allocate() {
  memory = {nullptr, std::free};
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 256, lead + bytes) != 0) std::abort();
  memory = {static_cast<char*>(fresh), std::free};
  fill();
}

void Tensor::fill() {
  if (bytes > 0) std::memcpy(data(), given.data(), bytes);
}

int64_t Case::number(const std::string& name) const {
  const auto found = numbers.find(name);
  if (found == numbers.end()) throw std::runtime_error("the case does not say " + name);
  return found->second;
}

const Tensor* Case::tensor(const std::string& name) const {
  const auto found =
      std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

void* Case::scratch(const std::string& name, size_t bytes) const {
  Tensor& tensor = scratch_of_order[name];
  if (tensor.memory == nullptr) {
    tensor.role = Role::kScratch;
    tensor.bytes = bytes;
    tensor.given.assign(bytes, static_cast<char>(0xff));
    tensor.allocate();
  }
  if (tensor.bytes != bytes) throw std::runtime_error(name + " is not as large as before");
  return tensor.data();
}

Known::Known(const char* name, Op op) { ops()[name] = op; }

}  // namespace cases

int main() {
  std::ios::sync_with_stdio(false);
  for (;;) {
    cases::Case one;
    if (!cases::read(one)) return 0;
    std::vector<std::vector<char>> results;
    cases::limit_time();
    const std::string wrong = cases::run(one, results);
    if (wrong.empty()) {
      std::cout << "ok\n";
      for (const auto& result : results)
        std::cout.write(result.data(), static_cast<std::streamsize>(result.size()));
    } else {
      std::cout << "error " << wrong << "\n";
    }
    std::cout.flush();
  }
}
