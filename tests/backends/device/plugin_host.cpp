// Does with a plug-in what TensorRT does, with TensorRT's own headers: creates it, asks it for types, shapes and workspace as
// expressions, serializes and clones it, and runs it. Prints what it answers, a JSON document a line; the launch is that of the driver.
//
//   plugin_host OP PROGRAM DIMS KINDS      DIMS: 2x5x64,64,64; KINDS: a letter for each argument, p for pointers, i and l for numbers
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t&);

struct Expression : IDimensionExpr, apiv::VDimensionExpr
{
    int64_t value;
    explicit Expression(int64_t v)
        : value(v)
    {
        mImpl = this;
    }
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
};

struct Builder : IExprBuilder, apiv::VExprBuilder
{
    std::vector<std::unique_ptr<Expression>> made;
    Builder() { mImpl = this; }
    IDimensionExpr const* constant(int64_t value) override
    {
        made.push_back(std::make_unique<Expression>(value));
        return made.back().get();
    }
    IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& x, IDimensionExpr const& y) override
    {
        int64_t const a = x.getConstantValue(), b = y.getConstantValue();
        switch (op)
        {
        case DimensionOperation::kSUM: return constant(a + b);
        case DimensionOperation::kSUB: return constant(a - b);
        case DimensionOperation::kPROD: return constant(a * b);
        case DimensionOperation::kMAX: return constant(a > b ? a : b);
        case DimensionOperation::kMIN: return constant(a < b ? a : b);
        case DimensionOperation::kFLOOR_DIV: return constant(a / b);
        case DimensionOperation::kCEIL_DIV: return constant((a + b - 1) / b);
        default: std::abort();
        }
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override { std::abort(); }
};

static char const* kinds;

extern "C" int cuCtxSetCurrent(void*);
extern "C" void fake_on_launch(void (*)(void const*, unsigned const*, unsigned const*, unsigned, void*, void**));

static void onLaunch(void const*, unsigned const* grid, unsigned const* block, unsigned shared, void* stream, void** arguments)
{
    std::printf("{\"grid\": [%u, %u, %u], \"threads\": %u, \"shared\": %u, \"stream\": %zu, \"arguments\": [", grid[0], grid[1],
        grid[2], block[0], shared, reinterpret_cast<size_t>(stream));
    for (size_t i = 0; kinds[i] != 0; ++i)
    {
        long long value = 0;
        switch (kinds[i])
        {
        case 'i': value = *static_cast<int32_t*>(arguments[i]); break;
        case 'l': value = *static_cast<int64_t*>(arguments[i]); break;
        default: value = static_cast<long long>(*static_cast<uint64_t*>(arguments[i])); break;
        }
        std::printf("%s%lld", i ? ", " : "", value);
    }
    std::printf("]}\n");
}

int main(int, char** argv)
{
    std::vector<Dims> dims;
    std::stringstream text(argv[3]);
    for (std::string one; std::getline(text, one, ',');)
    {
        Dims found{};
        std::stringstream sizes(one);
        for (std::string size; one != "-" && std::getline(sizes, size, 'x');)
        {
            found.d[found.nbDims++] = std::stoll(size);
        }
        dims.push_back(found);
    }
    kinds = argv[4];
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < count; ++i)
    {
        auto* const one = static_cast<IPluginCreatorV3One*>(creators[i]);
        creator = std::strcmp(one->getPluginName(), argv[1]) == 0 ? one : creator;
    }
    if (creator == nullptr)
    {
        return 2;
    }
    PluginField field("program", argv[2], PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(argv[2])));
    PluginFieldCollection fields{1, &field};
    std::unique_ptr<IPluginV3> first(creator->createPlugin("one", &fields, TensorRTPhase::kBUILD));
    if (first == nullptr)
    {
        return 3;
    }
    auto* const build = static_cast<IPluginV3OneBuild*>(first->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const core = static_cast<IPluginV3OneCore*>(first->getCapabilityInterface(PluginCapabilityType::kCORE));
    int32_t const inputs = static_cast<int32_t>(dims.size()), outputs = build->getNbOutputs();
    std::vector<DataType> types(outputs);
    std::vector<DataType> const none(inputs);
    if (build->getOutputDataTypes(types.data(), outputs, none.data(), inputs) != 0)
    {
        return 4;
    }
    Builder builder;
    std::vector<DimsExprs> given(inputs), made(outputs);
    for (int32_t i = 0; i < inputs; ++i)
    {
        given[i].nbDims = dims[i].nbDims;
        for (int32_t k = 0; k < dims[i].nbDims; ++k)
        {
            given[i].d[k] = builder.constant(dims[i].d[k]);
        }
    }
    if (build->getOutputShapes(given.data(), inputs, nullptr, 0, made.data(), outputs, builder) != 0)
    {
        return 5;
    }
    std::vector<DynamicPluginTensorDesc> tensors(inputs + outputs);
    std::printf("{\"name\": \"%s\", \"namespace\": \"%s\", \"version\": \"%s\", \"outputs\": [", core->getPluginName(),
        core->getPluginNamespace(), core->getPluginVersion());
    for (int32_t i = 0; i < outputs; ++i)
    {
        std::printf("%s[%d", i ? ", " : "", static_cast<int>(types[i]));
        for (int32_t k = 0; k < made[i].nbDims; ++k)
        {
            std::printf(", %lld", static_cast<long long>(made[i].d[k]->getConstantValue()));
        }
        std::printf("]");
    }
    std::printf("], \"accepted\": [");
    for (int32_t i = 0; i < inputs + outputs; ++i)
    {
        int accepted = -1;
        for (int type = 0; type < 12; ++type)
        {
            tensors[i].desc.type = static_cast<DataType>(type);
            tensors[i].desc.format = TensorFormat::kLINEAR;
            if (build->supportsFormatCombination(i, tensors.data(), inputs, outputs))
            {
                accepted = accepted == -1 ? type : 99;
            }
        }
        tensors[i].desc.type = static_cast<DataType>(accepted);
        tensors[i].desc.format = TensorFormat::kCHW32;
        accepted = build->supportsFormatCombination(i, tensors.data(), inputs, outputs) ? 98 : accepted;
        std::printf("%s%d", i ? ", " : "", accepted);
    }
    for (int32_t i = 0; i < inputs; ++i)
    {
        tensors[i].desc.dims = tensors[i].min = tensors[i].max = tensors[i].opt = dims[i];
    }
    size_t const room = build->getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, outputs);
    std::printf("], \"workspace\": %zu}\n", room);
    // What an engine keeps, and what is made of it when it is loaded.
    auto* const before = static_cast<IPluginV3OneRuntime*>(first->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection const* kept = before->getFieldsToSerialize();
    std::unique_ptr<IPluginV3> loaded(creator->createPlugin("one", kept, TensorRTPhase::kRUNTIME));
    if (loaded == nullptr)
    {
        return 6;
    }
    auto* const runtime = static_cast<IPluginV3OneRuntime*>(loaded->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
    auto* const running = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    cuCtxSetCurrent(reinterpret_cast<void*>(size_t{1}));
    fake_on_launch(onLaunch);
    std::vector<PluginTensorDesc> in(inputs), out(outputs);
    std::vector<void const*> from(inputs);
    std::vector<void*> to(outputs);
    for (int32_t i = 0; i < inputs; ++i)
    {
        in[i].dims = dims[i];
        from[i] = reinterpret_cast<void const*>(static_cast<size_t>(0x1000 * (i + 1)));
    }
    for (int32_t i = 0; i < outputs; ++i)
    {
        to[i] = reinterpret_cast<void*>(static_cast<size_t>(0x100000 * (i + 1)));
    }
    void* const workspace = reinterpret_cast<void*>(size_t{0x7000010});
    auto* const stream = reinterpret_cast<cudaStream_t>(size_t{7});
    int const early = running->enqueue(in.data(), out.data(), from.data(), to.data(), workspace, stream);
    int const loadedCode = running->onShapeChange(in.data(), inputs, out.data(), outputs);
    int const done = running->enqueue(in.data(), out.data(), from.data(), to.data(), workspace, stream);
    from[0] = reinterpret_cast<void const*>(size_t{0x1008});
    int const crooked = running->enqueue(in.data(), out.data(), from.data(), to.data(), workspace, stream);
    std::printf("{\"early\": %d, \"load\": %d, \"done\": %d, \"crooked\": %d}\n", early, loadedCode, done, crooked);
    return 0;
}
